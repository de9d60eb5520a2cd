"""Why an engine starts without pages: those of the same model that it cannot use, and why not."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from operator import itemgetter
from typing import Any

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


def explain_cold_start(roots: Sequence[NamespacePaths], fields: Mapping[str, Any]) -> None:
    """Log which namespaces of this model hold pages that an engine with `fields` cannot use.

    Nothing is said where the engine finds pages of its own, nor where its namespace is private:
    that one is always new. `roots` are the engine's namespace in each directory of the tier. A
    few small files are read, and what cannot be read is passed over.
    """
    if EPOCH in fields or any(map(_may_hold_pages, roots)):
        return
    # by name: when an engine started on it last, where it lies, and its fields
    others: dict[str, tuple[float, NamespacePaths, Mapping[str, Any]]] = {}
    private: set[str] = set()
    weights = fields.get("weights")
    for ours in roots:
        for opened, paths in _candidates(ours):
            theirs = _fields_of(paths)
            if theirs is None or not (
                _split(paths)[0] == _split(ours)[0]  # the model's name for display
                or (weights is not None and theirs.get("weights") == weights)
            ):
                continue
            if EPOCH in theirs:
                private.add(paths.name)
            elif paths.name not in others or others[paths.name][0] < opened:
                others[paths.name] = opened, paths, theirs
    digest = _split(roots[0])[1]
    newest = sorted(others.values(), key=itemgetter(0), reverse=True)
    for _, paths, there in newest[:_MOST_LINES]:
        all_fields = f"kvstrata ls {paths.root} --why {_split(paths)[1]} {digest}"
        said = _sentence(differences(fields, there), all_fields)
        _say(paths.root, f"{paths.name!r} differs in {said}")
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
    model, digest = _split(ours)
    found = []
    with suppress(OSError):
        for name in nofollow.listdir(ours.root):
            match = NAMESPACE_DIR.fullmatch(name)
            if match is None or match["digest"] == digest:
                continue
            paths = NamespacePaths(ours.root, name)
            with suppress(OSError):
                opened = nofollow.lstat(paths.home).st_mtime
                found.append((match["model"] == model, opened, paths))
    for _, opened, paths in heapq.nlargest(_MOST_READ, found, key=itemgetter(0, 1)):
        yield opened, paths


def _fields_of(paths: NamespacePaths) -> dict[str, Any] | None:
    """The fields of a namespace that holds pages; None if it holds none or is not sound."""
    with suppress(OSError, ValueError):
        fields = read_config(paths.config)
        if _holds_pages(paths) and namespace_digest(fields) == _split(paths)[1]:
            return fields
    return None


def _split(paths: NamespacePaths) -> tuple[str, str]:
    """Model and digest in the name."""
    model, _, digest = paths.name.rpartition("_")
    return model, digest


def _holds_pages(paths: NamespacePaths) -> bool:
    """Whether there are pages, or directories that were made for some; asks for names only."""
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
