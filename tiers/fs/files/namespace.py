"""Where a namespace lies, and its fields written out in config.json."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from kvstrata.tiers.base import TierConfigError
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.files.differences import differences
from kvstrata.tiers.fs.files.layout import NAMESPACE_DIR, NamespacePaths
from kvstrata.tiers.fs.files.temporary import temporary_name
from kvstrata.tiers.page.identity import (
    MAX_CONFIG_BYTES,
    config_text,
    directory_name,
    namespace_digest,
)

_MAX_CONFIG_DEPTH = 32  # of nested values; far above any namespace, below Python's recursion limit
_MAX_SHOWN = 200  # characters of a name or value in an error


def namespace_paths(root: str, model: str, fields: Mapping[str, Any]) -> NamespacePaths:
    """Where the namespace with these fields lies below `root`, or is to lie.

    The model's name in the directory's is for display only: a directory that was made under
    another name, with its config.json, serves unless there is one of exactly this name.
    """
    digest = namespace_digest(fields)
    ours = NamespacePaths(root, directory_name(model, digest))
    others: list[NamespacePaths] = []
    with suppress(OSError):  # what is wrong with the root is said when it is opened
        for name in sorted(os.listdir(root)):
            match = NAMESPACE_DIR.fullmatch(name)
            if match is not None and match["digest"] == digest:
                others.append(NamespacePaths(root, name))
    return next((paths for paths in (ours, *others) if nofollow.lexists(paths.config)), ours)


def make_namespace(
    paths: NamespacePaths, fields: Mapping[str, Any], file_mode: int, dir_mode: int
) -> None:
    """Create the directories and config.json below a root that exists, unless they are there.

    Raises:
        OSError: one cannot be created.
    """
    for directory in (paths.home, paths.pages):
        nofollow.make_directories(directory, paths.root, dir_mode)
    if not nofollow.lexists(paths.config):
        publish(paths.config, config_text(fields), file_mode)


def publish(path: str, text: str, mode: int) -> None:
    """Write an ASCII file that appears whole, and on the disk, or not at all.

    Raises:
        OSError: it cannot be written.
    """
    temporary = os.path.join(os.path.dirname(path), temporary_name())
    fd = nofollow.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(fd, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(fd)
        nofollow.rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            nofollow.unlink(temporary)
        raise


def read_config(path: str) -> dict[str, Any]:
    """The fields in a config.json, which may be anybody's work.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file of a sane size that holds a JSON object.
    """
    fd = nofollow.open(path, os.O_RDONLY)
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_CONFIG_BYTES:
            raise ValueError("not a regular file of at most 1 MiB")
        return parse_config(file.read(MAX_CONFIG_BYTES))


def parse_config(raw: bytes) -> dict[str, Any]:
    """The fields in the bytes of a config.json, at most `MAX_CONFIG_BYTES` of anybody's work.

    Raises:
        ValueError: they are not a JSON object.
    """
    try:
        fields = json.loads(raw)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    if not _is_shallow(fields, _MAX_CONFIG_DEPTH):
        raise ValueError("nested too deep")
    return fields


def validate_config(paths: NamespacePaths, fields: Mapping[str, Any]) -> None:
    """Compare config.json with the fields of this engine.

    Raises:
        PermissionError: it is another user's.
        TierConfigError: it is unreadable, or a field differs; the message names the field.
    """
    remedy = "move that directory away or choose another root_dir"
    try:
        found = read_config(paths.config)
    except PermissionError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{error!s:.200}"
        raise TierConfigError(
            f"root_dir: {paths.config!r} is unreadable ({reason}); {remedy}"
        ) from error
    if difference := first_difference(fields, found, paths.config):
        raise TierConfigError(f"root_dir: {difference}; {remedy}")


def first_difference(fields: Mapping[str, Any], found: Mapping[str, Any], where: str) -> str:
    """The first field in which the config.json `where` differs from this engine's; "" for none."""
    differing = differences(fields, found)
    if not differing:
        return ""
    theirs, ours = differing[0].values(_MAX_SHOWN)
    return (
        f"field {differing[0].name[:_MAX_SHOWN]!r} of {where!r} is {theirs}, but this engine has "
        f"{ours}"
    )


def _is_shallow(value: object, depth: int) -> bool:
    """Whether lists and objects are nested at most `depth` levels."""
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_is_shallow(each, depth - 1) for each in inner)
