"""Going through everything below a root, a little at a time."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from kvstrata.tiers.fs.budget.limits import BLOCK, file_cost
from kvstrata.tiers.fs.budget.names import Names
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.files.layout import PAGES_DIR
from kvstrata.tiers.fs.files.temporary import is_abandoned, is_temporary

BOOKS_NAME = ".kvstrata"  # the directory of ledger, journals, snapshot and spares
_MAX_DEPTH = 32


@dataclass(slots=True)
class Walked:
    """What a walk met that is no page and not in quarantine; `swept` counts removed temporaries."""

    other_bytes: int = 0
    other_files: int = 0
    swept: int = 0


def walk(
    root: str,
    names: Names,
    found: Walked,
    seen: Callable[[bytes, int, int], None],
    is_writing: Callable[[str], bool],
) -> Iterator[None]:
    """Call `seen(name, cost, mtime in ns)` for what can be evicted; add up the rest in `found`.

    Yields after each entry. Abandoned temporaries are removed; those for which `is_writing`
    holds are not counted, since their writers have reserved them. The books themselves are
    left out. Links are not followed; what cannot be read is passed over.
    """
    pending: list[list[str]] = [[]]
    while pending:
        parts = pending.pop()
        leaf = len(parts) == 3 and PAGES_DIR.fullmatch(parts[0]) is not None
        if not leaf:
            found.other_bytes += BLOCK  # a leaf is in the cost of the files in it
        with suppress(OSError), nofollow.scandir(os.path.join(root, *parts)) as entries:
            for entry in entries:
                with suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        if len(parts) < _MAX_DEPTH and (parts or entry.name != BOOKS_NAME):
                            pending.append([*parts, entry.name])
                    else:
                        _meet(root, entry, [*parts, entry.name], names, found, seen, is_writing)
                yield


def _meet(
    root: str,
    entry: os.DirEntry[str],
    parts: list[str],
    names: Names,
    found: Walked,
    seen: Callable[[bytes, int, int], None],
    is_writing: Callable[[str], bool],
) -> None:
    status = entry.stat(follow_symlinks=False)
    if is_temporary(entry.name):
        if stat.S_ISREG(status.st_mode) and is_abandoned(entry.name, time.time() - status.st_mtime):
            nofollow.unlink(os.path.join(root, *parts))
            found.swept += 1
            return
        if is_writing(entry.name):
            return
    name = names.name(parts)
    if name is not None:
        seen(name, file_cost(status.st_size), status.st_mtime_ns)
    else:
        found.other_bytes += file_cost(status.st_size) - BLOCK
        found.other_files += 1
