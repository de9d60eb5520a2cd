"""Digests of files that were read before, in the user's cache directory.

`<cache>/kvstrata/weights/<device>-<inode>` holds one line: size, mtime, ctime, SHA-256. One file
each, published by rename, so that engines that start together need no lock. Whatever is wrong
with the directory or a file in it, the weights are read again.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Iterator

from kvstrata.offload.vllm_plugin.weights.identity import Identity

MOST_FILES = 4096  # a model has at most some hundreds
_NS = 1_000_000_000
# Between two changes within one tick of a file system's clock nothing can tell. The ticks of
# file systems with fractions of seconds are below 10 ms; the rest is for clocks of servers.
SETTLED_NS = 2 * _NS
_LINE = re.compile(rb"(\d+) (-?\d+) (-?\d+) ([0-9a-f]{64})\n")
_LONGEST = 4096


class DigestMemory:
    """The remembered digests of this user.

    Args:
        directory: where they lie; None remembers nothing.
    """

    def __init__(self, directory: str | None) -> None:
        self._directory = directory

    def get(self, file: Identity) -> str | None:
        """SHA-256 of the file's content in hex, if it was read before and is unchanged."""
        try:
            with self._opened() as folder:
                line = _read(_name(file), folder)
                found = _LINE.fullmatch(line)
                if found is None or tuple(map(int, found.groups()[:3])) != file[2:]:
                    return None
                with contextlib.suppress(OSError):  # only what is used the longest ago must go
                    os.utime(_name(file), dir_fd=folder, follow_symlinks=False)
                return found[4].decode()
        except OSError:
            return None

    def put(self, file: Identity, digest: str, *, began_ns: int) -> None:
        """Remember the content that was read from `began_ns` (since the epoch) on.

        Only where a change during or after that would show: not of a file that was changed
        less than `SETTLED_NS` before, nor where change times have whole seconds, as those of
        images and of object stores have, which no change moves.
        """
        if began_ns - file.ctime_ns < SETTLED_NS or file.ctime_ns % _NS == 0:
            return
        line = f"{file.size} {file.mtime_ns} {file.ctime_ns} {digest}\n"
        with contextlib.suppress(OSError), self._opened(make=True) as folder:
            temporary = f".{secrets.token_hex(8)}"
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
            try:
                with open(fd, "w") as out:
                    out.write(line)
                os.rename(temporary, _name(file), src_dir_fd=folder, dst_dir_fd=folder)
            except OSError:
                os.unlink(temporary, dir_fd=folder)
                raise
            _bound(folder)

    @contextlib.contextmanager
    def _opened(self, *, make: bool = False) -> Iterator[int]:
        """The directory's descriptor; OSError if it is missing or others can write to it."""
        if self._directory is None:
            raise FileNotFoundError("there is no cache directory")
        if make:
            os.makedirs(self._directory, 0o700, exist_ok=True)
        folder = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            _check_owner(os.fstat(folder))
            yield folder
        finally:
            os.close(folder)


def default_memory() -> DigestMemory:
    """The memory in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return DigestMemory(os.path.join(base, "kvstrata/weights") if os.path.isabs(base) else None)


def _name(file: Identity) -> str:
    return f"{file.device:x}-{file.inode:x}"


def _check_owner(status: os.stat_result) -> None:
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError("somebody else may have written it")


def _read(name: str, folder: int) -> bytes:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    try:
        status = os.fstat(fd)
        _check_owner(status)
        return os.read(fd, _LONGEST) if stat.S_ISREG(status.st_mode) else b""
    finally:
        os.close(fd)


def _bound(folder: int) -> None:
    """Beyond `MOST_FILES`, let go of the quarter that was used longest ago."""
    names = os.listdir(folder)
    if len(names) <= MOST_FILES:
        return
    ages = []
    for name in names:
        with contextlib.suppress(OSError):  # another engine was faster
            ages.append((os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime_ns, name))
    for _, name in sorted(ages)[: len(ages) - MOST_FILES * 3 // 4]:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=folder)
