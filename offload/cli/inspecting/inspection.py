"""What a single file is: a page, a config.json, a temporary, or somebody else's file."""

from __future__ import annotations

import json
import os
import stat
import struct
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kvstrata.tiers.base import key_group
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.files.layout import (
    NAMESPACE_DIR,
    PAGE_SUFFIX,
    NamespacePaths,
)
from kvstrata.tiers.fs.files.namespace import read_config
from kvstrata.tiers.fs.files.temporary import is_abandoned, is_temporary
from kvstrata.tiers.fs.tools.scan import FileReport, check_place, inspect_file, known_layouts
from kvstrata.tiers.page.form import FORMAT_VERSION
from kvstrata.tiers.page.identity import CONFIG_NAME, namespace_digest

# Files of whole models have headers of up to a few MiB; the library would take 100 MB.
_MAX_FOREIGN_HEADER = 2**24
_PAGE_METADATA = {"checksum", "key", "namespace"}
_SPECIAL = {
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as the file's header names it; `dtype` is safetensors' word."""

    name: str
    dtype: str
    shape: list[int]
    bytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a file is. What does not apply, or cannot be read, is None or empty."""

    path: str  # as given
    # "page", "temporary", "abandoned temporary", "config.json", "foreign safetensors", "unknown",
    # or the kind of a file that is not regular
    kind: str
    bytes: int
    reason: str | None = None  # why it is bad
    directory: str | None = None  # of config.json, of the namespace in whose place the file lies
    format_version: str | None = None  # of the page
    key: str | None = None  # the offload key in hex
    group: int | None = None  # the KV cache group in it
    tokens: int | None = None  # of the chunk
    namespace: str | None = None  # its digest
    data_offset: int | None = None  # where the data begins, in bytes
    checksum: str | None = None  # "good" or "bad", where it was compared
    tensors: list[Tensor] = field(default_factory=list)  # in the order of the file
    # The config.json that has the digest `namespace`: the file itself, its namespace's, one beside
    # it, or that of another namespace of the root
    config: str | None = None
    fields: dict[str, Any] | None = None  # of `config`: all that decided what the bytes mean


def inspect(path: str) -> Inspection:
    """Read the file whole and say what it is; nothing but a regular file is opened.

    Raises:
        OSError: there is nothing at `path`, or its directory cannot be searched.
    """
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        kind = _SPECIAL.get(stat.S_IFMT(found.st_mode), "unknown")
        return Inspection(path, kind, 0, "not a regular file; the tier never opens it")
    name = os.path.basename(path)
    # the links on the way there are the user's own
    where = os.path.join(os.path.realpath(os.path.dirname(path)), name)
    home = _home_of(where)
    inspection = _inspect(where, name, home, found)
    config, fields = _made_of(where, home, inspection.namespace)
    directory = None if home is None else home.home
    return replace(inspection, path=path, directory=directory, config=config, fields=fields)


def _inspect(
    path: str, name: str, home: NamespacePaths | None, found: os.stat_result
) -> Inspection:
    """What the file itself and its place tell."""
    if name == CONFIG_NAME:
        return _inspect_config(path, found.st_size)
    if is_temporary(name):
        abandoned = is_abandoned(name, time.time() - found.st_mtime)
        kind = "abandoned temporary" if abandoned else "temporary"
        return replace(_page(path, kind, inspect_file(path)), reason=None)
    report = inspect_file(path)
    # <pages>/<hhh>/<hh>_g<group>/ has the page's file
    in_place = home is not None and Path(home.pages) in Path(path).parents[2:3]
    if home is not None and in_place and name.endswith(PAGE_SUFFIX):
        return _page(path, "page", check_place(home, report, known_layouts(home)))
    if report.header is not None:
        return _page(path, "page", report)
    return _foreign(path, report) or _no_page(path, report)


def _home_of(path: str) -> NamespacePaths | None:
    """The namespace in whose directories `path`, absolute, lies, be it in the quarantine."""
    for parent in Path(path).parents:
        name = parent.name.removesuffix("_r0")
        if NAMESPACE_DIR.fullmatch(name):
            return NamespacePaths(str(parent.parent), name)
    return None


def _made_of(
    path: str, home: NamespacePaths | None, digest: str | None
) -> tuple[str, dict[str, Any]] | tuple[None, None]:
    """The nearest config.json with this digest, and its fields; nothing else names them."""
    near = [os.path.join(os.path.dirname(path), CONFIG_NAME)]
    if home is not None:
        near.append(home.config)
        with suppress(OSError):
            others = (NamespacePaths(home.root, name) for name in nofollow.listdir(home.root))
            near += sorted(other.config for other in others if other.name.endswith(f"_{digest}"))
    for config in near if digest is not None else ():
        with suppress(OSError, ValueError):
            fields = read_config(config)
            if namespace_digest(fields) == digest:
                return config, fields
    return None, None


def _no_page(path: str, report: FileReport) -> Inspection:
    """A file that neither its place nor its header makes a page."""
    inspection = _page(path, "unknown", report)
    if report.cause in ("truncated", "header"):  # else it was not read, or has another version
        return replace(inspection, reason=f"not a page file: {report.detail}")
    return inspection


def _page(path: str, kind: str, report: FileReport) -> Inspection:
    """`report` in the words of an inspection."""
    cause, header = report.cause, report.header
    inspection = Inspection(path, kind, report.size)
    if cause is not None:
        inspection = replace(inspection, reason=f"{cause}: {report.detail}")
    if header is None:
        return inspection
    verdicts = {None: "good", "key": "good", "namespace": "good", "checksum": "bad"}
    verdict = verdicts.get(cause)  # with another cause, the form was not judged to the end
    return replace(
        inspection,
        format_version=FORMAT_VERSION,
        key=header.key.hex(),
        group=key_group(header.key),
        tokens=header.layout.tokens,
        namespace=header.namespace,
        data_offset=None if verdict is None else len(header.encode()),
        checksum=verdict,
        tensors=[Tensor(t.name, t.dtype, list(t.shape), t.nbytes) for t in header.layout.tensors],
    )


def _inspect_config(path: str, size: int) -> Inspection:
    """A config.json: its fields, and whether they have the digest in the directory's name."""
    try:
        fields = read_config(path)
        digest = namespace_digest(fields)
    except OSError as error:
        return Inspection(path, CONFIG_NAME, size, f"unreadable: {error.strerror}")
    except ValueError as error:
        return Inspection(path, CONFIG_NAME, size, f"config: {error!s:.200}")
    reason = None
    home = NAMESPACE_DIR.fullmatch(os.path.basename(os.path.dirname(os.path.abspath(path))))
    if home is not None and home["digest"] != digest:
        reason = f"config: its fields have the digest {digest}, not the directory's"
    return Inspection(path, CONFIG_NAME, size, reason, namespace=digest)


def _foreign(path: str, report: FileReport) -> Inspection | None:
    """A file that the safetensors library accepts; None if it does not.

    One that has the metadata of a page is a page that is bad, for the reason in `report`.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        start = os.pread(fd, 8, 0)
        if len(start) < 8 or (length := struct.unpack("<Q", start)[0]) > _MAX_FOREIGN_HEADER:
            return None
        with safe_open(f"/proc/self/fd/{fd}", framework="numpy") as file:
            metadata = file.metadata() or {}
        header = json.loads(os.pread(fd, length, 8))
    except (SafetensorError, OSError):
        return None
    finally:
        os.close(fd)
    ours = metadata.keys() >= _PAGE_METADATA
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    entries.sort(key=lambda item: item[1]["data_offsets"])
    return Inspection(
        path,
        "page" if ours else "foreign safetensors",
        report.size,
        f"{report.cause}: {report.detail}" if ours else None,
        format_version=metadata.get("format_version") if ours else None,
        data_offset=8 + length,
        tensors=[
            Tensor(name, entry["dtype"], entry["shape"], end - begin)
            for name, entry in entries
            for begin, end in [entry["data_offsets"]]
        ],
    )
