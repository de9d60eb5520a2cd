"""One namespace's page files: store, load and look, each verified, none believed blindly."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress

from kvstrata.tiers.base import PageKey, TierContext
from kvstrata.tiers.fs.budget.ledger import LedgerBusy
from kvstrata.tiers.fs.budget.limits import file_cost
from kvstrata.tiers.fs.budget.member import Member
from kvstrata.tiers.fs.config import FsConfig
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.files.direct_io import FileIO
from kvstrata.tiers.fs.files.failures import error_cause
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.files.namespace import make_namespace
from kvstrata.tiers.fs.files.quarantine import Identity, Quarantine, identity
from kvstrata.tiers.fs.files.temporary import temporary_name
from kvstrata.tiers.fs.ground import Ground
from kvstrata.tiers.page.form import MAX_HEADER_BYTES, BadPage
from kvstrata.tiers.page.page import PageForm
from kvstrata.tiers.process.medium import Medium, Outcome, PageRef

AUDIT = "audit"  # the cause of a page that was found to be another than the model's
_MKDIR_TRIES = 5  # eviction removes directories that became empty, perhaps this one again


class PageFiles(Medium):
    """The files of one namespace. Its methods block on the disk; any thread may call them.

    Args:
        config: the tier's options.
        context: the namespace, which must be open, and its layouts. All keys must be of it.
        paths: where the namespace lies.
        direct: whether O_DIRECT is to be used, from `open_namespace`.
        report: is told cause and detail of what fails beside the outcomes, on any thread.
        member: writes in the books of the root; None if none are kept.
        ground: where the root stands; None if it is not to be made again.
        quarantined: is told why a file was put aside, on any thread.
    """

    def __init__(
        self,
        config: FsConfig,
        context: TierContext,
        paths: NamespacePaths,
        direct: bool,
        report: Callable[[str, str], None],
        member: Member | None = None,
        ground: Ground | None = None,
        quarantined: Callable[[str], None] = lambda cause: None,
    ) -> None:
        self._ground = ground
        self._quarantined = quarantined
        self._report = report
        self._member = member
        self._config = config
        self._fields = dict(context.namespace)
        self._form = PageForm(context)
        self.paths = paths
        self._quarantine = Quarantine(self.paths, config.dir_mode)
        self._io = FileIO(direct, cached_first=config.io == "auto")

    def exists(self, keys: Sequence[PageKey]) -> list[bool]:
        """Whether plausible files of the pages are there; implausible ones are moved away."""
        return list(map(self._exists, keys))

    def _exists(self, key: PageKey) -> bool:
        try:
            return self._plausible(key, self.paths.page(key))
        except OSError as error:
            self._report(error_cause(error), str(error))
            return False

    def store(self, page: PageRef, view: memoryview, access: int) -> Outcome:
        """Publish the page, unless a plausible file is there and is not to be replaced."""
        key = page.key
        path = self.paths.page(key)
        try:
            if not page.rewrite and self._plausible(key, path):
                self._note_use(page, access)
                return Outcome()
            if not self._write_within(path, page, view, access):
                full = "there is no room for a page on the disk, or within its budget"
                return Outcome("budget", detail=full)
            if self._config.durability == "fsync":
                _fsync_directory(os.path.dirname(path))
            return Outcome(moved=True)
        except LedgerBusy as error:
            return Outcome("books", detail=str(error))
        except OSError as error:
            cause = error_cause(error)
            cause = {"missing": "no-directory", "unreadable": "denied"}.get(cause, cause)
            return Outcome(cause, detail=f"{path}: {error.strerror or error}")

    def load(self, page: PageRef, view: memoryview, access: int) -> Outcome:
        """Fill the view from the page's file and verify it."""
        key = page.key
        path = self.paths.page(key)
        try:
            if bad := self._read(path, key, view):
                return bad
            self._note_use(page, access)
            return Outcome(moved=True)
        except OSError as error:
            cause = error_cause(error)
            if cause == "missing":
                if self._member is not None:
                    self._member.gone(key)
                return Outcome(cause, gone=True, detail=str(error))
            if cause in ("symlink", "not-regular", "unreadable"):
                return self._reject(key, cause, str(error), None)
            # perhaps the disk's fault and not the file's: leave the file, do not believe it
            return Outcome(cause, gone=True, stuck=True, detail=str(error))

    def reject(self, page: PageRef, computed: memoryview, distrust: bool) -> Outcome:
        """Move the page's file to the quarantine, and write there what the model computes."""
        key = page.key
        path = self.paths.page(key)
        taken = self._quarantine.take(path, AUDIT, None)
        self._report(AUDIT, f"{path}: not what the model computes")
        if taken == "moved":
            try:
                self._keep_computed(key, computed)
            except OSError as error:  # what matters is that the other is out of the way
                self._report(error_cause(error), f"{path}: no copy of the computed page")
        if self._member is not None:
            self._member.quarantined()
            if taken != "stuck":
                self._member.gone(key)
        return Outcome(moved=taken == "moved", gone=True, stuck=taken == "stuck")

    def _keep_computed(self, key: bytes, computed: memoryview) -> None:
        """Write a page into the quarantine, if the budget has room for it."""
        path = self._quarantine.path(self.paths.page(key), f"{AUDIT}-computed")
        if self._member is None:
            self._write(path, key, computed)
        elif (grant := self._member.admission.admit(self._cost(key))) is not None:
            try:
                self._write(path, key, computed)
            finally:
                self._member.admission.cancel(grant, False)  # booked as part of the quarantine

    def _note_use(self, page: PageRef, access: int) -> None:
        if self._member is not None:
            self._member.used(page.key, page.depth, access)

    def _write_within(self, path: str, page: PageRef, view: memoryview, access: int) -> bool:
        """Write the page if the budget, where there is one, has room for it; whether it had."""
        if self._member is None:
            self._write(path, page.key, view)
            return True
        grant = self._member.admission.admit(self._cost(page.key))
        if grant is None:
            return False
        try:
            self._write(path, page.key, view, grant.spare)
        except BaseException as error:
            full = isinstance(error, OSError) and error_cause(error) == "no-space"
            self._member.admission.cancel(grant, full)
            raise
        self._member.stored(page.key, grant.cost, page.depth, access)
        return True

    def _reject(self, key: bytes, cause: str, detail: str, found_bad: Identity | None) -> Outcome:
        taken = self._quarantine.take(self.paths.page(key), cause, found_bad)
        if taken == "moved":
            self._quarantined(cause)
        if taken == "gone":  # as a rule it was evicted while it was read
            cause = "missing"
        if taken != "stuck" and self._member is not None:
            if taken == "moved":
                self._member.quarantined()
            self._member.gone(key)
        return Outcome(cause, gone=True, stuck=taken == "stuck", detail=detail)

    def _cost(self, key: bytes) -> int:
        """What the page's file takes from the budget, in bytes."""
        return file_cost(self._form.size(key))

    def _plausible(self, key: bytes, path: str) -> bool:
        """Whether a regular file of the right size is there; anything else is moved away.

        Raises:
            OSError: it cannot be told.
        """
        try:
            found = nofollow.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        size = self._form.size(key)
        if stat.S_ISREG(found.st_mode) and found.st_size == size:
            return True
        kind = "size" if stat.S_ISREG(found.st_mode) else "not-regular"
        cause = "symlink" if stat.S_ISLNK(found.st_mode) else kind
        if kind == "size" and found.st_size < size:
            cause = "truncated"
        bad = self._reject(key, cause, path, identity(found))
        self._report(bad.cause or cause, bad.detail)
        return False

    def _read(self, path: str, key: bytes, view: memoryview) -> Outcome | None:
        """Fill the view; what became of the page if the file is none of it."""
        fd = self._io.open(path, os.O_RDONLY)
        try:
            found = os.fstat(fd)
            self._read_open(fd, found, key, view)
            return None
        except BadPage as bad:
            return self._reject(key, bad.cause, f"{path}: {bad.detail}", identity(found))
        finally:
            os.close(fd)

    def _read_open(self, fd: int, found: os.stat_result, key: bytes, view: memoryview) -> None:
        if not stat.S_ISREG(found.st_mode):
            raise BadPage("not-regular", f"mode {found.st_mode:o}")
        if found.st_size != self._form.size(key):
            start = self._io.read_start(fd, min(found.st_size, MAX_HEADER_BYTES))
            raise self._form.blame(key, start, found.st_size)
        header = self._io.header_buffer(self._form.header_size(key))
        try:
            self._io.read(fd, (header, view))
        except EOFError:
            raise BadPage("truncated", "it became shorter") from None
        self._form.verify(key, bytes(header), view)

    def _write(self, path: str, key: bytes, view: memoryview, spare: str | None = None) -> None:
        """Write the page into a new file, or over `spare`, and give it its name."""
        header = self._form.header(key, view)
        directory, name = os.path.split(path)
        for tries_left in reversed(range(_MKDIR_TRIES)):
            try:
                leaf = self._enter(directory)
                try:
                    return self._write_in(leaf, name, header, view, spare)
                finally:
                    os.close(leaf)
            except FileNotFoundError:
                if not tries_left:
                    raise

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

    def _enter(self, directory: str) -> int:
        """A descriptor of the directory; where it is missing, it is made first."""
        with suppress(FileNotFoundError):
            return nofollow.open(directory, os.O_PATH | os.O_DIRECTORY)
        root, mode = self.paths.pages, self._config.dir_mode
        try:
            leaf = nofollow.make(directory, root, mode)
        except FileNotFoundError:  # the namespace is gone, or eviction took the parent again
            if self._ground is not None:
                self._ground.restore()
            make_namespace(self.paths, self._fields, self._config.file_mode, mode)
            leaf = nofollow.make(directory, root, mode)
        try:
            if self._config.durability == "fsync":
                with suppress(FileNotFoundError):
                    for parent in (os.path.dirname(directory), root, self.paths.root):
                        _fsync_directory(parent)
        except BaseException:
            os.close(leaf)
            raise
        return leaf

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
