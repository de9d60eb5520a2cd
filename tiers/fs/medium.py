"""One namespace's page files: store, load and look, each verified, none believed blindly."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress

from kvstrata.tiers.base import PageLayout, TierContext, key_group
from kvstrata.tiers.fs.budget.ledger import LedgerBusy
from kvstrata.tiers.fs.budget.limits import file_cost
from kvstrata.tiers.fs.budget.member import Member
from kvstrata.tiers.fs.config import FsConfig
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.files.direct_io import FileIO
from kvstrata.tiers.fs.files.failures import error_cause
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.files.namespace import namespace_digest
from kvstrata.tiers.fs.files.quarantine import Identity, Quarantine, identity
from kvstrata.tiers.fs.files.temporary import temporary_name
from kvstrata.tiers.fs.files.trust import distrust, is_trusted
from kvstrata.tiers.fs.ground import Ground
from kvstrata.tiers.fs.startup import make_namespace
from kvstrata.tiers.page.form import (
    MAX_HEADER_BYTES,
    BadPage,
    encode_header,
    header_bytes,
    page_checksum,
    verify_header,
)
from kvstrata.tiers.process.messages import Outcome, PageRef

AUDIT = "audit"  # the cause of a page that was found to be another than the model's
_MKDIR_TRIES = 5  # eviction removes directories that became empty, perhaps this one again


class PageFiles:
    """The files of one namespace. Its methods block on the disk; any thread may call them.

    Args:
        config: the tier's options.
        context: the namespace, which must be open, and its layouts. All keys must be of it.
        paths: where the namespace lies.
        direct: whether O_DIRECT is to be used, from `open_namespace`.
        report: is told cause and detail of each failure, on any thread.
        space: the books of the root; None if none are kept.
        ground: where the root stands; None if it is not to be made again.
    """

    def __init__(
        self,
        config: FsConfig,
        context: TierContext,
        paths: NamespacePaths,
        direct: bool,
        report: Callable[[str, str], None],
        space: Member | None = None,
        ground: Ground | None = None,
    ) -> None:
        self._ground = ground
        self._report = report
        self._space = space
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

    def store(self, page: PageRef, view: memoryview, access: int) -> Outcome:
        """Publish the page, unless a plausible file is there and is not to be replaced."""
        key = page.key
        path = self.paths.page(key)
        try:
            if not page.rewrite and self._plausible(key, path):
                self._note_use(page, access)
                return Outcome()
            if self._space is None:
                self._write(path, key, view)
            elif not self._write_within(self._space, path, page, view, access):
                return Outcome("budget")
            if self._config.durability == "fsync":
                _fsync_directory(os.path.dirname(path))
            return Outcome(moved=True)
        except LedgerBusy as error:
            self._report("books", str(error))
            return Outcome("books")
        except OSError as error:
            cause = error_cause(error)
            cause = {"missing": "no-directory", "unreadable": "denied"}.get(cause, cause)
            self._report(cause, f"{path}: {error.strerror or error}")
            return Outcome(cause)
        except Exception as error:
            return self._internal(error)

    def load(self, page: PageRef, view: memoryview, access: int) -> Outcome:
        """Fill the view from the page's file and verify it."""
        key = page.key
        path = self.paths.page(key)
        try:
            self._read(path, key, view)
            self._note_use(page, access)
            return Outcome(moved=True)
        except BadPage as bad:
            return self._reject(key, bad.cause, f"{path}: {bad.detail}", bad.identity)
        except OSError as error:
            cause = error_cause(error)
            if cause == "missing":
                self._report(cause, str(error))
                if self._space is not None:
                    self._space.gone(key)
                return Outcome(cause, gone=True)
            if cause in ("symlink", "not-regular", "unreadable"):
                return self._reject(key, cause, str(error), None)
            # perhaps the disk's fault and not the file's: leave the file, do not believe it
            self._report(cause, str(error))
            return Outcome(cause, gone=True, stuck=True)
        except Exception as error:
            return self._internal(error)

    def reject(self, key: bytes, computed: memoryview) -> Outcome:
        """Move the page's file to the quarantine, and write there what the model computes."""
        path = self.paths.page(key)
        try:
            taken = self._quarantine.take(path, AUDIT, None)
            self._report(AUDIT, f"{path}: not what the model computes")
            if taken == "moved":
                try:
                    self._keep_computed(key, computed)
                except OSError as error:  # what matters is that the other is out of the way
                    self._report(error_cause(error), f"{path}: no copy of the computed page")
            if self._space is not None:
                self._space.quarantined()
                if taken != "stuck":
                    self._space.gone(key)
            return Outcome(moved=taken == "moved", gone=True, stuck=taken == "stuck")
        except Exception as error:
            return self._internal(error)._replace(gone=True, stuck=True)

    def distrust(self) -> bool:
        """Mark the namespace as one that is not to be believed; whether that was possible."""
        try:
            distrust(self.paths, self._config.file_mode)
            return True
        except OSError as error:
            self._report("distrust", f"the namespace cannot be marked yet: {error}")
            return False

    def is_trusted(self) -> bool | None:
        """Whether the namespace is not marked; None where that cannot be told."""
        try:
            return is_trusted(self.paths)
        except OSError as error:
            self._report("distrust", f"whether the namespace is marked cannot be told: {error}")
            return None

    def _keep_computed(self, key: bytes, computed: memoryview) -> None:
        """Write a page into the quarantine, if the budget has room for it."""
        grant = self._space.admission.admit(self._cost(key)) if self._space is not None else None
        if self._space is not None and grant is None:
            return
        try:
            header = encode_header(key, self._digest, self._layout(key), page_checksum(computed))
            path = self._quarantine.path(self.paths.page(key), f"{AUDIT}-computed")
            directory, name = os.path.split(path)
            self._in_directory(
                directory, lambda leaf: self._write_in(leaf, name, header, computed, None)
            )
        finally:
            if self._space is not None and grant is not None:
                self._space.admission.cancel(grant, False)  # booked as part of the quarantine

    def _note_use(self, page: PageRef, access: int) -> None:
        if self._space is not None:
            self._space.used(page.key, page.depth, access)

    def _write_within(
        self, space: Member, path: str, page: PageRef, view: memoryview, access: int
    ) -> bool:
        """Write the page if the budget has room for it; whether it had."""
        grant = space.admission.admit(self._cost(page.key))
        if grant is None:
            self._report("budget", "there is no room for a page on the disk, or within its budget")
            return False
        try:
            self._write(path, page.key, view, grant.spare)
        except BaseException as error:
            full = isinstance(error, OSError) and error_cause(error) == "no-space"
            space.admission.cancel(grant, full)
            raise
        space.stored(page.key, grant.cost, page.depth, access)
        return True

    def _internal(self, error: Exception) -> Outcome:
        """A mistake in this code, or a view that went away, must not cost a result."""
        self._report("internal", f"{type(error).__name__}: {error}")
        return Outcome("internal")

    def _reject(self, key: bytes, cause: str, detail: str, found_bad: Identity | None) -> Outcome:
        taken = self._quarantine.take(self.paths.page(key), cause, found_bad)
        if taken == "gone":  # as a rule it was evicted while it was read
            cause = "missing"
        self._report(cause, detail)
        if taken != "stuck" and self._space is not None:
            if taken == "moved":
                self._space.quarantined()
            self._space.gone(key)
        return Outcome(cause, gone=True, stuck=taken == "stuck")

    def _cost(self, key: bytes) -> int:
        """What the page's file takes from the budget, in bytes."""
        layout = self._layout(key)
        return file_cost(len(encode_header(key, self._digest, layout)) + layout.nbytes)

    def _layout(self, key: bytes) -> PageLayout:
        return self._layouts[key_group(key)]

    def _plausible(self, key: bytes, path: str) -> bool:
        """Whether a regular file of the right size is there; anything else is moved away.

        Raises:
            OSError: it cannot be told.
        """
        try:
            found = nofollow.lstat(path)
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
        self._reject(key, cause, path, identity(found))
        return False

    def _read(self, path: str, key: bytes, view: memoryview) -> None:
        fd = self._io.open(path, os.O_RDONLY)
        try:
            found = os.fstat(fd)
            try:
                self._read_open(fd, found, key, view)
            except BadPage as bad:
                bad.identity = identity(found)
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

    def _write(self, path: str, key: bytes, view: memoryview, spare: str | None = None) -> None:
        """Write the page into a new file, or over `spare`, and give it its name."""
        header = encode_header(key, self._digest, self._layout(key), page_checksum(view))
        directory, name = os.path.split(path)
        self._in_directory(directory, lambda leaf: self._write_in(leaf, name, header, view, spare))

    def _write_in(
        self, leaf: int, name: str, header: bytes, view: memoryview, spare: str | None
    ) -> None:
        """Write the file `name` in the open directory `leaf`."""
        if spare is not None:
            with nofollow.parent(spare) as (place, temporary):
                fd = self._open_spare(temporary, place, len(header) + view.nbytes)
                if fd is not None:
                    self._publish(fd, temporary, place, name, leaf, header, view)
                    return
        temporary, flags = temporary_name(), os.O_WRONLY | os.O_CREAT | os.O_EXCL
        fd = self._io.open(temporary, flags, mode=self._config.file_mode, dir_fd=leaf)
        self._publish(fd, temporary, leaf, name, leaf, header, view)

    def _publish(
        self,
        fd: int,
        temporary: str,
        place: int,
        name: str,
        leaf: int,
        header: bytes,
        view: memoryview,
    ) -> None:
        """Write the open file `temporary` in `place`, close it, and make it `name` in `leaf`."""
        try:
            try:
                buffer = self._io.header_buffer(len(header))
                buffer[:] = header
                self._io.write(fd, (buffer, view))
                if self._config.durability == "fsync":
                    os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(temporary, name, src_dir_fd=place, dst_dir_fd=leaf)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=place)
            raise

    def _in_directory(self, directory: str, action: Callable[[int], None]) -> None:
        """Do what needs the open directory; where it is missing, make it first.

        Raises:
            OSError: the directory cannot be made, or the action failed.
        """
        for _ in range(_MKDIR_TRIES):
            try:
                with nofollow.directory(directory) as fd:
                    return action(fd)
            except FileNotFoundError:
                self._make_leaf(directory)
        with nofollow.directory(directory) as fd:
            action(fd)

    def _make_leaf(self, directory: str) -> None:
        mode = self._config.dir_mode
        try:
            nofollow.make_directories(directory, self.paths.pages, mode)
        except FileNotFoundError:  # the namespace is gone, or eviction took the parent again
            if self._ground is not None:
                self._ground.restore()
            make_namespace(self._config, self.paths, self._fields)
            with suppress(FileNotFoundError):
                nofollow.make_directories(directory, self.paths.pages, mode)
        if self._config.durability == "fsync":
            with suppress(FileNotFoundError):
                for parent in (os.path.dirname(directory), self.paths.pages, self.paths.root):
                    _fsync_directory(parent)

    def _open_spare(self, spare: str, place: int, size: int) -> int | None:
        """A descriptor of a file to overwrite; None, and the file gone, where it cannot serve."""
        try:
            fd = self._io.open(spare, os.O_WRONLY, dir_fd=place)
            try:
                found = os.fstat(fd)
                # a second name would see its content change; another's file stays another's
                if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
                    raise OSError(errno.EINVAL, "not a plain file", spare)
                if found.st_uid != os.geteuid():
                    raise OSError(errno.EPERM, "another user's file", spare)
                if found.st_size != size:
                    os.ftruncate(fd, size)
                os.fchmod(fd, self._config.file_mode)
            except BaseException:
                os.close(fd)
                raise
            return fd
        except OSError:
            with suppress(OSError):
                os.unlink(spare, dir_fd=place)
            return None


def _fsync_directory(path: str) -> None:
    fd = nofollow.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
