"""One worker's part in making the region usable, in threads of its own while the engine serves.

A worker reserves its own ranges of slots (see progress.py), and pins everybody's. The first
round, a range of each worker, is there before the engine starts; a slot that is not yet usable by
all workers is not given to a page. Threads reserve where the worker's memory policy and CPUs say.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from functools import partial

from kvstrata.offload.primary.region import Region

logger = logging.getLogger("kvstrata")

# A thread needs about 0.6 s of a CPU for a GiB (docs/benchmarks.md); half of the machine's CPUs are
# left to the start of the engine.
MOST_THREADS = 4
POLL_S = 0.01

Pin = Callable[[range], None]  # of slots; raises RuntimeError when it is refused


class Reserver:
    """See the module. Calls come from one thread, in the order of the methods.

    Args:
        region: of the engine, mapped by this worker.
        rank: this worker.
    """

    def __init__(self, region: Region, rank: int) -> None:
        self._region = region
        self._progress = region.progress
        self._rank = rank
        self._started = time.monotonic()
        self._own = iter(range(rank, self._progress.ranges, self._progress.workers))
        self._ended: set[int] = set()  # own ranges, counted, that ended before an earlier one
        self._reserved = 0  # own ranges up to the first that has not ended
        self._lock = threading.Lock()  # of these three
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def reserve_first(self) -> range:
        """Reserve this worker's first range; its slots.

        Raises:
            RegionError: there is too little memory.
        """
        index = next(self._own)
        self._reserve(index)
        return self._progress.slots_of(index)

    def start(self, pin: Pin) -> None:
        """All workers have reserved their first range, and this one can use them. Do the rest."""
        self._pin = pin
        self._progress.set_usable(self._rank, self._progress.workers)
        count = len(os.sched_getaffinity(0)) // (2 * self._progress.workers)
        if self._progress.workers == self._progress.ranges:
            return  # that was all
        work = [self._reserve_own] * max(1, min(MOST_THREADS, count)) + [self._pin_all]
        if self._rank == 0:
            logger.info(
                "kvstrata: %d of %d slots of the CPU tier are reserved after %.2f s; the rest "
                "follows while the engine starts and serves (workers: %d, threads of each: %d)",
                self._progress.first_slots,
                self._region.slots,
                time.monotonic() - self._started,
                self._progress.workers,
                len(work) - 1,
            )
        for target in work:
            # daemons: nobody waits for them where a worker ends without `stop`
            thread = threading.Thread(target=target, name="kvstrata-reserver", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """End what is under way, which takes as long as one range does. Callable twice."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _reserve_own(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                index = next(self._own, None)
            if index is None or index >= self._progress.limit:
                return
            try:
                self._reserve(index)
            except Exception as error:  # whatever it is, the others must not wait for the range
                self._leave_out(index, error)
                return

    def _reserve(self, index: int) -> None:
        self._region.reserve(self._progress.slots_of(index))
        with self._lock:
            self._ended.add(index // self._progress.workers)
            while self._reserved in self._ended:
                self._ended.remove(self._reserved)
                self._reserved += 1
            self._progress.set_reserved(self._rank, self._reserved)

    def _pin_all(self) -> None:
        progress = self._progress
        # Pinning may break the CUDA graphs that vLLM captures between registration and this.
        self._wait(lambda: progress.serving)
        for index in range(progress.workers, progress.ranges):
            self._wait(partial(self._settled, index))
            if self._stop.is_set() or not progress.reserved(index):
                break
            try:
                self._pin(progress.slots_of(index))
            except Exception as error:
                self._leave_out(index, error)
                break
            progress.set_usable(self._rank, index + 1)
        if self._rank == 0 and self._wait(lambda: progress.complete):
            logger.info(
                "kvstrata: %d of %d slots of the CPU tier can be used, %.1f s after its start",
                progress.usable(),
                self._region.slots,
                time.monotonic() - self._started,
            )

    def _settled(self, index: int) -> bool:
        return self._progress.reserved(index) or index >= self._progress.limit

    def _wait(self, condition: Callable[[], bool]) -> bool:
        """Wait for it; False if the worker ends before."""
        while not condition():
            if self._stop.wait(POLL_S):
                return False
        return True

    def _leave_out(self, index: int, error: Exception) -> None:
        first = self._progress.limit == self._progress.ranges
        with self._lock:
            self._progress.leave_out(self._rank, index)
        if first:  # the others will not fare better
            logger.warning(
                "kvstrata: the CPU tier stays smaller than it should be: worker %d: %s",
                self._rank,
                error,
            )
