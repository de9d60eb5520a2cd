"""Speed at the budget: every store evicts, against stock's plain store that never deletes."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from kvstrata.tiers.fs.budget.limits import file_cost
from tests.bench.fs.contestants import Contestant, Ours, Stock, has_stock
from tests.bench.fs.figures import Figure
from tests.bench.fs.transfers import PAGES, new_keys
from tests.bench.jobs import Memory

OPERATION = "store at the budget"
_PAGE_BYTES = 2**21
_ROUNDS_KEPT = 4  # what the budget holds, in rounds


def measure(root: Path, repeat: int) -> Iterator[Figure]:
    """Rounds of pages that were never seen before; the contestants take turns."""
    memory = Memory(_PAGE_BYTES, PAGES)
    budget = _ROUNDS_KEPT * PAGES * file_cost(_PAGE_BYTES + 4096)
    root.mkdir()
    contestants: list[Contestant] = [Ours(root, memory, {"max_bytes": budget})]
    for _ in range(2 * _ROUNDS_KEPT):
        contestants[0].move(True, new_keys(), PAGES)
    if has_stock():
        contestants.append(Stock(root, memory))
    walls: dict[str, list[float]] = defaultdict(list)
    for number in range(2 * repeat):
        for contestant in contestants[:: -1 if number % 2 else 1]:
            keys = new_keys()
            walls[contestant.name] += contestant.move(True, keys, PAGES)
            if not isinstance(contestant, Ours):
                contestant.clear(keys)
    for contestant in contestants:
        contestant.close()
    memory.close()
    for name, seconds in walls.items():
        speed = PAGES * _PAGE_BYTES / 1e9 / statistics.median(seconds)
        yield Figure(name, OPERATION, f"one job of {PAGES}", "idle", _PAGE_BYTES, "GB/s", speed)
