"""Reading a root from outside an engine: what is there, and whether it is sound.

Nothing is known of the model here, so a file is judged by itself and by its place. Used by
the command line; unlike the tier it also asks the official safetensors library.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open

from kvstrata.tiers.base import PageLayout, TensorSpec, key_group, layouts_from_json
from kvstrata.tiers.fs import nofollow
from kvstrata.tiers.fs.codec import BadPage, FileHeader, format_checksum, header_bytes, parse_header
from kvstrata.tiers.fs.failures import error_cause
from kvstrata.tiers.fs.layout import (
    NAMESPACE_DIR,
    PAGE_SUFFIX,
    PAGES_DIR,
    NamespacePaths,
    is_key,
)
from kvstrata.tiers.fs.namespace import namespace_digest, read_config
from kvstrata.tiers.fs.temporary import is_temporary

_READ_BYTES = 2**22


@dataclass(frozen=True, slots=True)
class FileReport:
    """What a page file is.

    Attributes:
        path: as given.
        size: bytes, 0 where it is not a regular file.
        cause: None for a sound file, else the word the tier would count it under.
        detail: the cause in a few words, or "".
        header: what the header says, None where it cannot be read.
    """

    path: str
    size: int
    cause: str | None
    detail: str
    header: FileHeader | None

    @property
    def group(self) -> int | None:
        """KV cache group index of the page."""
        return key_group(self.header.key) if self.header else None

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The tensors of the page."""
        return self.header.layout.tensors if self.header else ()


@dataclass(slots=True)
class NamespaceReport:
    """One namespace below a root: its page files are counted, not read.

    Attributes:
        model, digest: from the directory's name.
        path: the directory of config.json.
        fields: what config.json holds, None where it is missing or unreadable.
        oldest, newest: when a page was written, in seconds since the epoch; None without pages.
    """

    model: str
    digest: str
    path: str
    fields: dict[str, Any] | None
    files: int = 0
    bytes: int = 0
    temporary: int = 0
    quarantined: int = 0
    oldest: float | None = None
    newest: float | None = None


@dataclass(slots=True)
class RootReport:
    """Totals over the namespaces of a root; `bad` holds the reports of files that are not sound."""

    namespaces: int = 0
    files: int = 0
    bytes: int = 0
    temporary: int = 0
    quarantined: int = 0
    bad: list[FileReport] = field(default_factory=list)


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


def list_namespaces(root: str) -> list[NamespaceReport]:
    """The namespaces below `root`, by name.

    Raises:
        OSError: `root` is not a readable directory.
    """
    root = os.path.realpath(root)
    reports = []
    for name in _namespace_names(root):
        match = NAMESPACE_DIR.fullmatch(name)
        assert match is not None
        paths = NamespacePaths(root, name)
        try:
            fields = read_config(paths.config)
            namespace_digest(fields)  # has none if a number is not finite
        except (OSError, ValueError):
            fields = None
        report = NamespaceReport(match["model"], match["digest"], paths.home, fields)
        for kind, path in _walk(paths):
            if kind == "page":
                report.files += 1
                with suppress(OSError):  # it went away meanwhile
                    found = nofollow.lstat(path)
                    report.bytes += found.st_size
                    report.oldest = min(found.st_mtime, report.oldest or found.st_mtime)
                    report.newest = max(found.st_mtime, report.newest or found.st_mtime)
            else:
                _tally(report, kind)
        reports.append(report)
    return reports


def check_root(root: str, progress: Callable[[FileReport], None] | None = None) -> RootReport:
    """Verify every page file below `root`, and every namespace's config.json.

    An engine may be at work there: a page that it removes meanwhile does not count.
    `progress` is called with the report of each file as it was read.

    Raises:
        OSError: `root` is not a readable directory.
    """
    root = os.path.realpath(root)
    total = RootReport()
    for name in _namespace_names(root):
        paths = NamespacePaths(root, name)
        total.namespaces += 1
        if (config := _check_config(paths)) is not None:
            total.bad.append(config)
        layouts = known_layouts(paths)
        for kind, path in _walk(paths, total.bad):
            if kind != "page":
                _tally(total, kind)
                continue
            report = check_place(paths, inspect_file(path), layouts)
            if report.cause == "missing":
                continue
            total.files += 1
            total.bytes += report.size
            if report.cause is not None:
                total.bad.append(report)
            if progress is not None:
                progress(report)
    return total


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
    cause = None
    if not paths.name.endswith(f"_{header.namespace}"):
        cause, detail = "namespace", f"of namespace {header.namespace!r}"
    elif not is_key(header.key) or report.path != paths.page(header.key):
        cause, detail = "key", f"the page of key {header.key.hex()}"
    elif layouts.get(key_group(header.key), header.layout) != header.layout:
        cause, detail = "shape", f"holds {header.layout}"
    return report if cause is None else FileReport(report.path, report.size, cause, detail, header)


def _check_config(paths: NamespacePaths) -> FileReport | None:
    """A report if config.json is missing, unreadable, or of another digest."""
    try:
        digest = namespace_digest(read_config(paths.config))
    except OSError as error:
        cause = error_cause(error)
        return FileReport(paths.config, 0, cause, error.strerror or str(error), None)
    except ValueError as error:
        return FileReport(paths.config, 0, "config", f"{error!s:.200}", None)
    if paths.name.endswith(f"_{digest}"):
        return None
    return FileReport(paths.config, 0, "config", f"its fields have the digest {digest}", None)


def _namespace_names(root: str) -> list[str]:
    """Names `<model>_<digest>` below the root, also of those that lost their config.json."""
    names = set()
    for name in nofollow.listdir(root):
        if not os.path.isdir(os.path.join(root, name)):  # a link to one will be unreadable
            continue
        if PAGES_DIR.fullmatch(name):
            names.add(name.removesuffix("_r0"))
        elif NAMESPACE_DIR.fullmatch(name):
            names.add(name)
    return sorted(names)


def _walk(
    paths: NamespacePaths, unreadable: list[FileReport] | None = None
) -> Iterator[tuple[str, str]]:
    """("page" | "temporary" | "quarantined", path) of everything in a namespace, by name.

    Files that are none of the tier's are passed over. Directories that cannot be read are
    added to `unreadable`.
    """
    pending = [paths.pages, paths.home]
    while pending:
        directory = pending.pop()
        try:
            with nofollow.scandir(directory) as scan:
                entries = sorted(
                    (entry.name, entry.is_dir(follow_symlinks=False)) for entry in scan
                )
        except FileNotFoundError:
            continue
        except OSError as error:
            if unreadable is not None:
                why = error.strerror or str(error)
                unreadable.append(FileReport(directory, 0, error_cause(error), why, None))
            continue
        inside = directory == paths.quarantine
        for name, is_directory in entries:
            path = os.path.join(directory, name)
            if inside:
                yield "quarantined", path
            elif name.endswith(PAGE_SUFFIX):
                yield "page", path
            elif is_temporary(name):
                yield "temporary", path
            elif is_directory:
                pending.append(path)


def _tally(report: NamespaceReport | RootReport, kind: str) -> None:
    if kind == "temporary":
        report.temporary += 1
    else:
        report.quarantined += 1
