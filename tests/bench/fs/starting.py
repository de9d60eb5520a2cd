"""A start on a directory that holds very many files, with books and without."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from kvstrata.tiers.base import (
    Lookup,
    PageLayout,
    RequestView,
    TensorSpec,
    TierContext,
    layouts_to_json,
)
from kvstrata.tiers.fs.budget.ledger import BOOKS_NAME, Ledger
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.process.index import MAX_PRESENT
from tests.bench.fs.contestants import Ours
from tests.bench.fs.figures import Figure
from tests.bench.jobs import Memory

_PAGE_BYTES = 4096
_REQUEST = RequestView("bench")
_T = TypeVar("_T")


def measure(root: Path, files: int) -> Iterator[Figure]:
    """Seconds of a start, to the first answer of a look-up, and until the index is loaded.

    The files have the right size and no content, which a start does not look at.
    """
    memory = Memory(_PAGE_BYTES, 1)
    layout = PageLayout((TensorSpec("kv", "U8", (1, _PAGE_BYTES)),), 16)
    namespace = {"pages": layouts_to_json({0: layout})}
    context = TierContext("bench", namespace, {0: layout}, memory.region)

    def start() -> FsTier:
        return FsTier({"root_dir": str(root)}, context)

    def figure(operation: str, seconds: float) -> Figure:
        return Figure(Ours.name, operation, f"{files} files", "idle", 0, "s", seconds)

    shape = "empty directory"
    tier, seconds = _timed(start)
    yield figure("start", seconds)._replace(shape=shape)
    yield figure("first look-up", _answer(tier))._replace(shape=shape)
    tier.shutdown(60.0)
    key = _fill(tier.paths[0].page, files)
    shutil.rmtree(root / BOOKS_NAME)

    tier, seconds = _timed(start)
    yield figure("start without books", seconds)
    yield figure("first look-up without books", _answer(tier))
    yield figure("first scan", _timed(lambda: _wait_until_counted(root))[1])
    tier.shutdown(600.0)

    began = time.perf_counter()
    tier, seconds = _timed(start)
    yield figure("start", seconds)
    yield figure("first look-up", _answer(tier))
    while tier.stats().gauges["pages"] < min(files, MAX_PRESENT):
        time.sleep(0.002)
    yield figure("index loaded", time.perf_counter() - began)
    assert tier.lookup(key, _REQUEST) is Lookup.HIT or files > MAX_PRESENT
    tier.shutdown(60.0)
    memory.close()


def _answer(tier: FsTier) -> float:
    """Seconds until a look-up of an unknown key is answered."""
    key = os.urandom(32) + bytes(4)
    began = time.perf_counter()
    while tier.lookup(key, _REQUEST) is Lookup.RETRY:
        tier.on_step_end()
        time.sleep(0.0001)
    return time.perf_counter() - began


def _fill(path_of: Callable[[bytes], str], files: int) -> bytes:
    """Make the files; the key of the last."""
    size = _PAGE_BYTES + 4096
    for _ in range(files):
        key = os.urandom(32) + bytes(4)
        path = path_of(key)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.truncate(size)
    return key


def _wait_until_counted(root: Path) -> None:
    ledger = Ledger(str(root), 0o600, 0o700)
    known = False
    while not known:
        time.sleep(0.1)
        with ledger.locked() as books:
            known = books.known
    ledger.close()


def _timed(action: Callable[[], _T]) -> tuple[_T, float]:
    began = time.perf_counter()
    result = action()
    return result, time.perf_counter() - began
