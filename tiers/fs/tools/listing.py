"""Which namespaces lie below a root, and what is in them: counted, not read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.files.failures import error_cause
from kvstrata.tiers.fs.files.layout import NAMESPACE_DIR, PAGE_SUFFIX, PAGES_DIR, NamespacePaths
from kvstrata.tiers.fs.files.namespace import read_config
from kvstrata.tiers.fs.files.temporary import has_no_writer, is_temporary
from kvstrata.tiers.fs.files.trust import is_trusted
from kvstrata.tiers.page.identity import namespace_digest


@dataclass(slots=True)
class NamespaceReport:
    """One namespace below a root.

    Attributes:
        model, digest: from the directory's name.
        path: the directory of config.json.
        fields: what config.json holds, None where it is missing or unreadable.
        config: what is wrong with config.json, None if it is sound.
        files, bytes: its page files.
        temporary: files that are being written, or were when their writer died.
        quarantined: files that were found bad.
        trusted: whether its pages may be used, see `tiers/fs/files/trust.py`.
        oldest, newest: when a page was written, in seconds since the epoch; None without pages.
    """

    model: str
    digest: str
    path: str
    fields: dict[str, Any] | None
    config: str | None
    files: int = 0
    bytes: int = 0
    temporary: int = 0
    quarantined: int = 0
    trusted: bool = True
    oldest: float | None = None
    newest: float | None = None


def list_namespaces(
    root: str, progress: Callable[[int], None] | None = None
) -> list[NamespaceReport]:
    """The namespaces below `root`, by name.

    `progress` is called with the size of each page file that was met.

    Raises:
        OSError: `root` is not a readable directory.
    """
    root = os.path.realpath(root)
    reports = []
    for paths in namespaces(root):
        model, _, digest = paths.name.rpartition("_")
        try:
            fields = read_config(paths.config)
            namespace_digest(fields)  # has none if a number is not finite
        except (OSError, ValueError):
            fields = None
        wrong = ": ".join(check_config(paths) or ()) or None
        report = NamespaceReport(model, digest, paths.home, fields, wrong)
        with suppress(OSError):
            report.trusted = is_trusted(paths)
        for kind, path in walk([paths.pages, paths.home], paths.quarantine):
            if kind == "page":
                report.files += 1
                with suppress(OSError):  # it went away meanwhile
                    found = nofollow.lstat(path)
                    report.bytes += found.st_size
                    report.oldest = min(found.st_mtime, report.oldest or found.st_mtime)
                    report.newest = max(found.st_mtime, report.newest or found.st_mtime)
                    if progress is not None:
                        progress(found.st_size)
            report.quarantined += kind == "quarantined"
            report.temporary += kind in ("temporary", "abandoned")
        reports.append(report)
    return reports


def namespaces(root: str) -> list[NamespacePaths]:
    """The namespaces below the root, by name; also those that lost their config.json.

    Raises:
        OSError: `root` is not a readable directory.
    """
    names = {
        name.removesuffix("_r0")
        for name in nofollow.listdir(root)
        if (NAMESPACE_DIR.fullmatch(name) or PAGES_DIR.fullmatch(name))
        and os.path.isdir(os.path.join(root, name))  # a link to one will be unreadable
    }
    return [NamespacePaths(root, name) for name in sorted(names)]


def check_config(paths: NamespacePaths) -> tuple[str, str] | None:
    """Cause and detail if config.json is missing, unreadable, or of another digest."""
    try:
        digest = namespace_digest(read_config(paths.config))
    except OSError as error:
        return error_cause(error), error.strerror or str(error)
    except ValueError as error:
        return "config", f"{error!s:.200}"
    if paths.name.endswith(f"_{digest}"):
        return None
    return "config", f"its fields have the digest {digest}"


def walk(
    directories: Iterable[str],
    quarantine: str | None,
    unreadable: Callable[[str, OSError], None] = lambda path, error: None,
) -> Iterator[tuple[str, str]]:
    """("page" | "temporary" | "abandoned" | "quarantined", path) of all in directories, by name.

    Files that are none of the tier's are passed over. `unreadable` is told of directories that
    cannot be read.
    """
    pending = list(directories)
    while pending:
        directory = pending.pop()
        try:
            with nofollow.scandir(directory) as scan:
                entries = sorted((each.name, each.is_dir(follow_symlinks=False)) for each in scan)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            unreadable(directory, error)
            continue
        for name, is_directory in entries:
            path = os.path.join(directory, name)
            if directory == quarantine:
                yield "quarantined", path
            elif name.endswith(PAGE_SUFFIX):
                yield "page", path
            elif is_temporary(name):
                yield "abandoned" if has_no_writer(path) else "temporary", path
            elif is_directory:
                pending.append(path)
