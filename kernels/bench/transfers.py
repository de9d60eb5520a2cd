"""Speed, CPU time and latency of the contestants, in turns, on one scene."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from kvstrata.kernels.bench.contestants import Piped
from kvstrata.kernels.bench.results.cases import (
    LARGE_BYTES,
    ONE_PAGE,
    OPERATIONS,
    SHARE,
    SPEED,
    STORE,
    SUBMIT,
    Case,
    Result,
)
from kvstrata.kernels.bench.scene import Contestant, Scene
from kvstrata.kernels.pipeline import GroupWork

# Of one submit of a per-fragment contestant. Its speed is the same from far fewer on, and half a
# microsecond for each of two million would make the run endless.
MOST_FRAGMENTS = 1 << 16
_MORE_OFTEN = 3  # rounds of small batches
_LOADS = 1000  # of one page, so that the 99th percentile is not the worst
_LOADS_S = 1.0  # or as many as fit into this time, but so many
_LEAST_LOADS = 200


def case(scene: Scene, operation: str, blocks: int) -> Case:
    """The case of so many blocks."""
    nbytes = scene.nbytes(scene.stores(blocks // scene.per_chunk))
    names = scene.model.name, scene.layout, operation
    return Case(*names, scene.per_chunk, blocks, nbytes, scene.fragment_bytes)


def measure(
    scene: Scene,
    contestants: Sequence[Contestant],
    blocks: Sequence[int],
    ceilings: Mapping[str, float],
    repeat: int,
) -> Iterator[Result]:
    """All operations on so many blocks, where these make whole chunks.

    ceilings: GB/s of each operation.
    """
    for number in blocks:
        pages, rest = divmod(number, scene.per_chunk)
        if rest:
            continue
        works = {c.name: _works(scene, c, pages) for c in contestants}
        for contestant in contestants:  # warms up, too
            scene.verify(contestant, len(works[contestant.name][STORE][0][0].slots))
        times: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
        for turn in range(repeat * (1 if _large(scene, number) else _MORE_OFTEN)):
            first = turn % len(contestants)
            for contestant in [*contestants[first:], *contestants[:first]]:
                for operation, (stores, loads) in works[contestant.name].items():
                    times[operation, contestant.name].append(_time(contestant, stores, loads))
        for (operation, name), taken in times.items():
            wall, submit = map(statistics.median, zip(*taken, strict=True))
            nbytes = sum(map(scene.nbytes, works[name][operation]))
            of = case(scene, operation, number)
            speed = nbytes / 1e9 / wall
            yield Result(of, name, SPEED, speed, "GB/s")
            yield Result(of, name, SHARE, speed / ceilings[operation], "")
            yield Result(of, name, SUBMIT, submit * 1e3 * (1 << 30) / nbytes, "ms/GiB")


def latency(scene: Scene, contestants: Sequence[Contestant]) -> Iterator[Result]:
    """Milliseconds from the submit of an expedited load of one page to its end."""
    (loads, *_) = scene.loads(1)  # of the first group
    for contestant in contestants:
        if not isinstance(contestant, Piped):
            continue
        taken: list[float] = []
        end = time.perf_counter() + _LOADS_S
        while len(taken) < _LEAST_LOADS or (len(taken) < _LOADS and time.perf_counter() < end):
            start = time.perf_counter()
            contestant.submit([], [loads], expedited=True)
            contestant.wait()
            taken.append(1e3 * (time.perf_counter() - start))
        taken.sort()
        of = case(scene, ONE_PAGE, scene.per_chunk)
        yield Result(of, contestant.name, "p50", statistics.median(taken), "ms")
        yield Result(of, contestant.name, "p99", taken[len(taken) * 99 // 100], "ms")


def _large(scene: Scene, blocks: int) -> bool:
    return case(scene, STORE, blocks).nbytes >= LARGE_BYTES


_Works = tuple[list[GroupWork], list[GroupWork]]


def _works(scene: Scene, contestant: Contestant, pages: int) -> dict[str, _Works]:
    """What is stored and loaded in each operation."""
    if contestant.per_fragment:
        pages = min(pages, max(1, MOST_FRAGMENTS // scene.fragments_per_page))
    stores, loads = scene.stores(pages), scene.loads(pages)
    works: tuple[_Works, ...] = ((stores, []), ([], loads), (stores, loads))
    return dict(zip(OPERATIONS, works, strict=True))


def _time(
    contestant: Contestant, stores: list[GroupWork], loads: list[GroupWork]
) -> tuple[float, float]:
    """Seconds to the end, and until submit returned."""
    start = time.perf_counter()
    contestant.submit(stores, loads)
    submitted = time.perf_counter()
    contestant.wait()
    return time.perf_counter() - start, submitted - start
