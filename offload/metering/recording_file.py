"""The file of a recording: a new one at each start, whole lines only, and never too large."""

from __future__ import annotations

import os
from contextlib import suppress
from itertools import count

MOST_BYTES = 2**30
_MODE = 0o600


class RecordingFile:
    """A file that is being written.

    Attributes:
        path: of it.
    """

    def __init__(self, path: str, engine: int = 0) -> None:
        """Make it: earlier recordings stay, so its name has a number behind it if need be.

        Args:
            path: of the first one; more of them are PATH.1, PATH.2, ...
            engine: number among the replicas, in the name of all but the first:
                PATH.engine1, PATH.engine1.1, ...

        Raises:
            OSError: it cannot be made.
        """
        base = f"{path}.engine{engine}" if engine else path
        for number in count():
            self.path = f"{base}.{number}" if number else base
            with suppress(FileExistsError):  # O_EXCL follows no link either
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
                self._file = os.open(self.path, flags, _MODE)
                break
        self._bytes = 0

    def has_room(self, nbytes: int) -> bool:
        """Whether so many bytes more make it not too large."""
        return self._bytes + nbytes <= MOST_BYTES

    def append(self, line: bytes) -> None:
        """Write a line, whole or not at all.

        Raises:
            OSError: the disk does not take it.
        """
        left = memoryview(line)
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, self._bytes)
            raise
        self._bytes += len(line)

    def close(self) -> None:
        """No more lines follow."""
        with suppress(OSError):
            os.close(self._file)
