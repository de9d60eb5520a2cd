"""A filesystem tier on a bad day, loaded by engines through `module_path`."""

import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from kvstrata.tiers.base import Job, JobResult, Lookup, RequestView, TierContext
from kvstrata.tiers.fs.tier import FsTier
from tests.tiers.faults import FaultyTier, SlowTier

FAILS = {"lookup": 0.002, "store": 0.03, "load": 0.06}  # share of the pages
SURE = 3  # which page fails in any case, so that a short run sees each failure too
RAISES = 0.0005  # share of the look-ups
HANGS = 0.03  # share of the jobs
LONGEST_HANG_S = 0.3
LATE_S = 0.003  # each job starts so late


class SoakTier(FaultyTier):
    """`FsTier` with failures, delays and short hangs; options: its own, and a `seed`."""

    medium = FsTier.medium

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """See `FsTier.check_options`."""
        FsTier.check_options(_of_files(options))

    def __init__(self, options: Mapping[str, Any], context: TierContext) -> None:
        """See `FsTier.__init__`."""
        self._random = random.Random(options["seed"])
        self._slow = SlowTier(FsTier(_of_files(options), context), seconds=LATE_S)
        self._hangs_until = 0.0
        self._asked: Counter[str] = Counter()
        super().__init__(self._slow, self._decide)

    def lookup(self, key: bytes, request: RequestView) -> Lookup:
        """A MISS too many, or an exception."""
        if self._random.random() < RAISES:
            raise RuntimeError("injected")
        return super().lookup(key, request)

    def get_finished(self) -> Sequence[JobResult]:
        """Go on after a hang that has lasted long enough."""
        if time.monotonic() >= self._hangs_until:
            self._slow.release()
        return super().get_finished()

    def submit_store(self, job: Job) -> None:
        """Hang now and then."""
        self._perhaps_hang()
        super().submit_store(job)

    def submit_load(self, job: Job) -> None:
        """Hang now and then."""
        self._perhaps_hang()
        super().submit_load(job)

    def _perhaps_hang(self) -> None:
        if self._random.random() < HANGS:
            self._hangs_until = time.monotonic() + self._random.uniform(0, LONGEST_HANG_S)
            self._slow.hang()

    def _decide(self, operation: str, key: bytes) -> str | None:
        self._asked[operation] += 1
        fails = self._asked[operation] == SURE or self._random.random() < FAILS[operation]
        return f"injected-{operation}" if fails else None


def _of_files(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "seed"}
