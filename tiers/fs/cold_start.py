"""Why an engine starts without pages: those of the same model that it cannot use, and why not."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from kvstrata.tiers.base import EPOCH
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.files.differences import Difference, differences
from kvstrata.tiers.fs.files.layout import NAMESPACE_DIR, QUARANTINE_NAME, NamespacePaths
from kvstrata.tiers.fs.files.namespace import read_config
from kvstrata.tiers.page.identity import namespace_digest

_MOST_READ = 32  # namespaces of each directory
_MOST_LINES = 3
_MOST_FIELDS = 5  # of a line
_MOST_SHOWN = 40  # characters of a value
_MAX_NAME = 100  # characters of a field's name, which is a foreign file's word

logger = logging.getLogger("kvstrata.tiers.fs")


class _Other(NamedTuple):
    """Another namespace of the model; `opened` is when an engine started on it last."""

    opened: float
    paths: NamespacePaths
    fields: Mapping[str, Any]


def explain_cold_start(roots: Sequence[NamespacePaths], fields: Mapping[str, Any]) -> None:
    """Log which namespaces of this model hold pages that an engine with `fields` cannot use.

    Nothing is said where the engine finds pages of its own, nor where its namespace is private:
    that one is always new. `roots` are the engine's namespace in each directory of the tier. A
    few small files are read, and what cannot be read is passed over.
    """
    if EPOCH in fields or any(map(_may_hold_pages, roots)):
        return
    others: dict[str, _Other] = {}
    private: set[str] = set()
    for ours in roots:
        for opened, paths in _candidates(ours):
            theirs = _fields_of(paths)
            if theirs is None or not _is_same_model(ours, fields, paths, theirs):
                continue
            if EPOCH in theirs:
                private.add(paths.name)
            elif paths.name not in others or others[paths.name].opened < opened:
                others[paths.name] = _Other(opened, paths, theirs)
    digest = _split(roots[0])[1]
    newest = sorted(others.values(), key=lambda other: other.opened, reverse=True)
    for other in newest[:_MOST_LINES]:
        all_fields = f"kvstrata ls {other.paths.root} --why {_split(other.paths)[1]} {digest}"
        said = _sentence(differences(fields, other.fields), all_fields)
        _say(other.paths.root, f"{other.paths.name!r} differs in {said}")
    root = roots[0].root
    if len(newest) > _MOST_LINES:
        _say(root, f"and {len(newest) - _MOST_LINES} more, listed by: kvstrata ls {root}")
    if private:
        _say(root, f"those of {len(private)} starts of engines whose weights may change")


def _say(root: str, which: str) -> None:
    logger.info(
        "kvstrata fs tier: %s has pages of this model that this engine cannot use: %s", root, which
    )


def _candidates(ours: NamespacePaths) -> Iterator[tuple[float, NamespacePaths]]:
    """When a namespace was opened last, and its paths: first those of this name, newest first.

    Their directory changes at each start of an engine, which tries whether it can be written.
    """
    found = []
    with suppress(OSError):
        for name in nofollow.listdir(ours.root):
            match = NAMESPACE_DIR.fullmatch(name)
            if match is None or match["digest"] == _split(ours)[1]:
                continue
            paths = NamespacePaths(ours.root, name)
            with suppress(OSError):
                same_name = match["model"] == _split(ours)[0]
                found.append((same_name, nofollow.lstat(paths.home).st_mtime, paths))
    for _, opened, paths in heapq.nlargest(_MOST_READ, found, key=lambda each: each[:2]):
        yield opened, paths


def _fields_of(paths: NamespacePaths) -> dict[str, Any] | None:
    """The fields of a namespace that holds pages; None if it holds none or is not sound."""
    with suppress(OSError, ValueError):
        fields = read_config(paths.config)
        if _holds_pages(paths) and namespace_digest(fields) == _split(paths)[1]:
            return fields
    return None


def _is_same_model(
    ours: NamespacePaths,
    fields: Mapping[str, Any],
    paths: NamespacePaths,
    theirs: Mapping[str, Any],
) -> bool:
    """Whether it has this model's name for display, or its weights."""
    weights = fields.get("weights")
    return _split(paths)[0] == _split(ours)[0] or (
        weights is not None and theirs.get("weights") == weights
    )


def _split(paths: NamespacePaths) -> tuple[str, str]:
    """Model and digest in the name."""
    model, _, digest = paths.name.rpartition("_")
    return model, digest


def _holds_pages(paths: NamespacePaths) -> bool:
    """Whether there are pages, or directories that were made for some; asks for names only.

    Raises:
        OSError: its directory cannot be listed.
    """
    try:
        with nofollow.scandir(paths.pages) as entries:
            return any(entry.name != QUARANTINE_NAME for entry in entries)
    except FileNotFoundError:
        return False


def _may_hold_pages(paths: NamespacePaths) -> bool:
    try:
        return _holds_pages(paths)
    except OSError:
        return True


def _sentence(differing: Sequence[Difference], all_fields: str) -> str:
    """`kv_dtype ("auto" there, "fp8" here)`, and the command that shows all if there are more."""
    words = []
    for field in differing[:_MOST_FIELDS]:
        theirs, ours = field.values(_MOST_SHOWN)
        words.append(f"{field.name[:_MAX_NAME]} ({theirs} there, {ours} here)")
    if (left := len(differing) - _MOST_FIELDS) > 0:
        words.append(f"and {left} more, shown by: {all_fields}")
    return ", ".join(words)
