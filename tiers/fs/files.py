"""One namespace's page files: store, load and look, each verified, none believed blindly."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import suppress

from kvstrata.tiers.base import PageLayout, TierContext, key_group
from kvstrata.tiers.fs.codec import (
    MAX_HEADER_BYTES,
    BadPage,
    encode_header,
    header_bytes,
    page_checksum,
    verify_header,
)
from kvstrata.tiers.fs.config import FsConfig
from kvstrata.tiers.fs.failures import error_cause
from kvstrata.tiers.fs.io import FileIO
from kvstrata.tiers.fs.layout import NamespacePaths
from kvstrata.tiers.fs.messages import Outcome
from kvstrata.tiers.fs.namespace import (
    make_directories,
    namespace_digest,
)
from kvstrata.tiers.fs.quarantine import Quarantine
from kvstrata.tiers.fs.startup import make_namespace
from kvstrata.tiers.fs.temporary import temporary_name


class PageFiles:
    """The files of one namespace. Its methods block on the disk; any thread may call them.

    Args:
        config: the tier's options.
        context: the namespace, which must be open, and its layouts. All keys must be of it.
        paths: where the namespace lies.
        direct: whether O_DIRECT is to be used, from `open_namespace`.
        report: is told cause and detail of each failure, on any thread.
    """

    def __init__(
        self,
        config: FsConfig,
        context: TierContext,
        paths: NamespacePaths,
        direct: bool,
        report: Callable[[str, str], None],
    ) -> None:
        self._report = report
        self._config = config
        self._fields = dict(context.namespace)
        self._layouts = dict(context.layouts)
        self._digest = namespace_digest(self._fields)
        self.paths = paths
        self._quarantine = Quarantine(self.paths, config.dir_mode)
        self._io = FileIO(direct, cached_first=config.io == "auto")

    def page_bytes(self, key: bytes) -> int:
        """Size of the page of this key."""
        return self._layout(key).nbytes

    def exists(self, key: bytes) -> bool:
        """Whether a plausible file of the page is there; implausible ones are moved away."""
        try:
            return self._plausible(key, self.paths.page(key))
        except OSError as error:
            self._report(error_cause(error), str(error))
        except Exception as error:
            self._internal(error)
        return False

    def store(self, key: bytes, view: memoryview, rewrite: bool) -> Outcome:
        """Publish the page unless a plausible file is there and `rewrite` is false."""
        path = self.paths.page(key)
        try:
            if not rewrite and self._plausible(key, path):
                return Outcome()
            self._write(path, key, view)
            return Outcome(moved=True)
        except OSError as error:
            cause = error_cause(error)
            cause = {"missing": "no-directory", "unreadable": "denied"}.get(cause, cause)
            self._report(cause, str(error))
            return Outcome(cause)
        except Exception as error:
            return self._internal(error)

    def load(self, key: bytes, view: memoryview) -> Outcome:
        """Fill the view from the page's file and verify it."""
        path = self.paths.page(key)
        try:
            self._read(path, key, view)
            return Outcome(moved=True)
        except BadPage as bad:
            return self._reject(path, bad.cause, f"{path}: {bad.detail}", bad.inode)
        except OSError as error:
            cause = error_cause(error)
            if cause == "missing":
                self._report(cause, str(error))
                return Outcome(cause, gone=True)
            if cause in ("symlink", "not-regular", "unreadable"):
                return self._reject(path, cause, str(error), None)
            # perhaps the disk's fault and not the file's: leave the file, do not believe it
            self._report(cause, str(error))
            return Outcome(cause, gone=True, stuck=True)
        except Exception as error:
            return self._internal(error)

    def _internal(self, error: Exception) -> Outcome:
        """A mistake in this code, or a view that went away, must not cost a result."""
        self._report("internal", f"{type(error).__name__}: {error}")
        return Outcome("internal")

    def _reject(self, path: str, cause: str, detail: str, inode: tuple[int, int] | None) -> Outcome:
        self._report(cause, detail)
        return Outcome(cause, gone=True, stuck=not self._quarantine.take(path, cause, inode))

    def _layout(self, key: bytes) -> PageLayout:
        return self._layouts[key_group(key)]

    def _plausible(self, key: bytes, path: str) -> bool:
        """Whether a regular file of the right size is there; anything else is moved away.

        Raises:
            OSError: it cannot be told.
        """
        try:
            found = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        layout = self._layout(key)
        size = len(encode_header(key, self._digest, layout)) + layout.nbytes
        if stat.S_ISREG(found.st_mode) and found.st_size == size:
            return True
        kind = "size" if stat.S_ISREG(found.st_mode) else "not-regular"
        cause = "symlink" if stat.S_ISLNK(found.st_mode) else kind
        if kind == "size" and found.st_size < size:
            cause = "truncated"
        self._reject(path, cause, path, (found.st_dev, found.st_ino))
        return False

    def _read(self, path: str, key: bytes, view: memoryview) -> None:
        fd = self._io.open(path, os.O_RDONLY)
        try:
            found = os.fstat(fd)
            try:
                self._read_open(fd, found, key, view)
            except BadPage as bad:
                bad.inode = (found.st_dev, found.st_ino)
                raise
        finally:
            os.close(fd)

    def _read_open(self, fd: int, found: os.stat_result, key: bytes, view: memoryview) -> None:
        if not stat.S_ISREG(found.st_mode):
            raise BadPage("not-regular", f"mode {found.st_mode:o}")
        layout = self._layout(key)
        header_size = len(encode_header(key, self._digest, layout))
        if found.st_size != header_size + layout.nbytes:
            self._blame_size(fd, found.st_size, key, layout)
        header = self._io.header_buffer(header_size)
        try:
            self._io.read(fd, (header, view))
        except EOFError:
            raise BadPage("truncated", "it became shorter") from None
        checksum = verify_header(bytes(header), key, self._digest, layout)
        if page_checksum(view) != checksum:
            raise BadPage("checksum", "the data is not what was written")

    def _blame_size(self, fd: int, size: int, key: bytes, layout: PageLayout) -> None:
        """Find the best word for a file of the wrong size; always raises BadPage."""
        start = self._io.read_start(fd, min(size, MAX_HEADER_BYTES))
        length = header_bytes(start[:8])
        if length <= len(start):
            verify_header(start[:length], key, self._digest, layout)
        too_short = length > size or size - length < layout.nbytes
        raise BadPage("truncated" if too_short else "size", f"{size} bytes")

    def _write(self, path: str, key: bytes, view: memoryview) -> None:
        header = encode_header(key, self._digest, self._layout(key), page_checksum(view))
        directory = os.path.dirname(path)
        temporary = os.path.join(directory, temporary_name())
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            fd = self._io.open(temporary, flags, self._config.file_mode)
        except FileNotFoundError:
            make_namespace(self._config, self.paths, self._fields)
            make_directories(directory, self._config.root_dir, self._config.dir_mode)
            if self._config.durability == "fsync":
                for parent in (os.path.dirname(directory), self.paths.pages, self.paths.root):
                    _fsync_directory(parent)
            fd = self._io.open(temporary, flags, self._config.file_mode)
        try:
            try:
                if self._config.file_mode & 0o077:
                    os.fchmod(fd, self._config.file_mode)  # what the umask took away
                buffer = self._io.header_buffer(len(header))
                buffer[:] = header
                self._io.write(fd, (buffer, view))
                if self._config.durability == "fsync":
                    os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        if self._config.durability == "fsync":
            _fsync_directory(directory)


def _fsync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
