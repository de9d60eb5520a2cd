"""Reading a root from outside an engine: what is there, and whether it is sound.

Nothing is known of the model here, so a file is judged by itself and by its place. Used by
the command line; unlike the tier it also asks the official safetensors library.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

import xxhash
from safetensors import SafetensorError, safe_open

from kvstrata.tiers.base import PageLayout, key_group, layouts_from_json
from kvstrata.tiers.fs.budget.ledger import BOOKS_NAME
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.files.failures import error_cause
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.files.namespace import read_config
from kvstrata.tiers.fs.files.quarantine import Identity, identity
from kvstrata.tiers.fs.tools.listing import check_config, namespaces, walk
from kvstrata.tiers.page.form import (
    BadPage,
    FileHeader,
    format_checksum,
    header_bytes,
    parse_header,
)
from kvstrata.tiers.page.identity import is_key

_READ_BYTES = 2**22
_TRIES = 3  # for a file that changes while it is read


@dataclass(frozen=True, slots=True)
class FileReport:
    """What a page file is.

    Attributes:
        path: as given.
        size: bytes, 0 where it is not a regular file.
        cause: None for a sound file, else the word the tier would count it under.
        detail: the cause in a few words, or "".
        header: what the header says, None where it cannot be read.
        kind: "page", "config", or "directory" for one that cannot be listed.
        found_bad: the identity of what is at `path`, where `check_root` found it bad.
    """

    path: str
    size: int
    cause: str | None
    detail: str
    header: FileHeader | None
    kind: str = "page"
    found_bad: Identity | None = None


@dataclass(slots=True)
class RootReport:
    """Totals over the namespaces of a root, and what is wrong.

    Attributes:
        temporary: files that somebody is writing.
        bad: what is not sound.
        abandoned: paths of temporaries whose writer died, also those of the budget's books.
    """

    namespaces: int = 0
    files: int = 0
    bytes: int = 0
    temporary: int = 0
    quarantined: int = 0
    bad: list[FileReport] = field(default_factory=list)
    abandoned: list[str] = field(default_factory=list)

    def note(self, kind: str, path: str) -> None:
        """Count a file that is no page."""
        if kind == "abandoned":
            self.abandoned.append(path)
        self.temporary += kind == "temporary"
        self.quarantined += kind == "quarantined"


def inspect_file(path: str) -> FileReport:
    """Read a whole file and judge it as a page of whatever model and key it names.

    The path must be free of links, as those below the real path of a root are.
    """
    size, header = 0, None
    try:
        fd = nofollow.open(path, os.O_RDONLY)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise BadPage("not-regular", f"mode {found.st_mode:o}")
            size = found.st_size
            header_size = header_bytes(os.pread(fd, 8, 0))
            raw = os.pread(fd, header_size, 0)
            if len(raw) < header_size:
                raise BadPage("truncated", "the header is cut off")
            header = parse_header(raw)
            _judge(fd, size, raw, header)
        finally:
            os.close(fd)
    except BadPage as bad:
        return FileReport(path, size, bad.cause, bad.detail, header)
    except OSError as error:
        return FileReport(path, size, error_cause(error), error.strerror or str(error), header)
    return FileReport(path, size, None, "", header)


def check_root(root: str, progress: Callable[[FileReport], None] | None = None) -> RootReport:
    """Verify every page file below `root`, and every namespace's config.json.

    An engine may be at work there: a page that it removes or overwrites meanwhile does not count.
    `progress` is called with the report of each file as it was read.

    Raises:
        OSError: `root` is not a readable directory.
    """
    root = os.path.realpath(root)
    total = RootReport()

    def unreadable(path: str, error: OSError) -> None:
        why = error.strerror or str(error)
        total.bad.append(FileReport(path, 0, error_cause(error), why, None, "directory"))

    for paths in namespaces(root):
        total.namespaces += 1
        before = _identity(paths.config)
        if (config := check_config(paths)) is not None:
            total.bad.append(FileReport(paths.config, 0, *config, None, "config", before))
        layouts = known_layouts(paths)
        for kind, path in walk([paths.pages, paths.home], paths.quarantine, unreadable):
            if kind != "page":
                total.note(kind, path)
            elif (report := _check_page(paths, path, layouts)) is not None:
                total.files += 1
                total.bytes += report.size
                if report.cause is not None:
                    total.bad.append(report)
                if progress is not None:
                    progress(report)
    # what else is wrong with the books their audit says
    for kind, path in walk([os.path.join(root, BOOKS_NAME)], None, unreadable):
        total.note(kind, path)
    return total


def _check_page(
    paths: NamespacePaths, path: str, layouts: Mapping[int, PageLayout]
) -> FileReport | None:
    """Judge a page file; None for one that was removed, or changes whenever it is read.

    A member that evicts renames a page away and overwrites it, so a bad file counts only if the
    same one is still there, and unchanged.
    """
    for _ in range(_TRIES):
        before = _identity(path)
        report = check_place(paths, inspect_file(path), layouts)
        if report.cause is None:
            return report
        if before is not None and before == _identity(path):
            return replace(report, found_bad=before)
    return None


def _identity(path: str) -> Identity | None:
    """The identity of what is at `path`; None if nothing is."""
    with suppress(OSError):
        return identity(nofollow.lstat(path))
    return None


def _judge(fd: int, size: int, raw: bytes, header: FileHeader) -> None:
    """Size, form of the header, checksum, and the official library's opinion."""
    expected = len(raw) + header.layout.nbytes
    if size != expected:
        word = "truncated" if size < expected else "size"
        raise BadPage(word, f"{size} bytes instead of {expected}")
    if header.encode() != raw:
        raise BadPage("header", "not in the form of this format")
    hasher = xxhash.xxh3_128()
    position = len(raw)
    while data := os.pread(fd, _READ_BYTES, position):
        hasher.update(data)
        position += len(data)
    if format_checksum(hasher.hexdigest()) != header.checksum:
        raise BadPage("checksum", "the data is not what was written")
    try:
        with safe_open(f"/proc/self/fd/{fd}", framework="numpy") as file:
            names = sorted(file.keys())
    except (SafetensorError, OSError) as error:
        raise BadPage("header", f"safetensors: {error}") from None
    if names != sorted(tensor.name for tensor in header.layout.tensors):
        raise BadPage("header", f"safetensors sees the tensors {names}")


def known_layouts(paths: NamespacePaths) -> Mapping[int, PageLayout]:
    """What the pages of a namespace must be, as far as its config.json tells."""
    try:
        return layouts_from_json(read_config(paths.config)["pages"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def check_place(
    paths: NamespacePaths, report: FileReport, layouts: Mapping[int, PageLayout]
) -> FileReport:
    """Compare a sound file's key and namespace with its path, and its layout with `layouts`."""
    if report.cause is not None or report.header is None:
        return report
    header = report.header
    if not paths.name.endswith(f"_{header.namespace}"):
        return replace(report, cause="namespace", detail=f"of namespace {header.namespace!r}")
    if not is_key(header.key) or report.path != paths.page(header.key):
        return replace(report, cause="key", detail=f"the page of key {header.key.hex()}")
    if layouts.get(key_group(header.key), header.layout) != header.layout:
        return replace(report, cause="shape", detail=f"holds {header.layout}")
    return report
