"""TierLink: one secondary tier, and what the manager has learnt of it."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable

from kvstrata.offload.audit.trust import Trust
from kvstrata.offload.metering.departures import Departures
from kvstrata.offload.metering.samples import Samples
from kvstrata.offload.primary.slots import Entry
from kvstrata.offload.secondary.breaker import CircuitBreaker
from kvstrata.offload.secondary.costs import TransferCost
from kvstrata.offload.secondary.load_queue import LoadQueue
from kvstrata.offload.secondary.pace import Pace
from kvstrata.offload.secondary.reuse import ReuseCounter
from kvstrata.tiers.base import SecondaryTier

MAX_LOST = 4096


class Traffic:
    """The jobs of one direction under way at a tier, and what earlier ones cost."""

    def __init__(self) -> None:
        self.jobs = 0
        self.pages = 0
        self.nbytes = 0
        self.seconds = 0.0  # that the tier was at work for jobs that ended, summed over them
        self.cost = TransferCost()
        self.progress = -math.inf  # when a job last ended, or a page arrived


class TierLink:
    """A secondary tier as the manager deals with it.

    Args:
        name: the tier's in requests, logs and metrics.
        tier: itself, behind its guard.
        index: its place in the order of look-up.
        deadline_s: its `promotion_deadline_s`.
        clock: seconds, monotonic.
        lookup_deadline_s: its own, if not the engine's.
        medium: vLLM's word: "CPU", "STORAGE", or None for anything else.
        may_load, may_store: whether its pages are looked for, and whether it is given any.
        fills: whether the tiers before it are given what is found in it.
        store_threshold, max_tracker_size, kv_events: those of its entry in `secondary_tiers`.
    """

    def __init__(
        self,
        name: str,
        tier: SecondaryTier,
        index: int,
        deadline_s: float,
        clock: Callable[[], float],
        *,
        lookup_deadline_s: float | None = None,
        medium: str | None = None,
        may_load: bool = True,
        may_store: bool = True,
        fills: bool = True,
        store_threshold: int = 0,
        max_tracker_size: int = 64_000,
        kv_events: bool = True,
    ) -> None:
        self.name = name
        self.tier = tier
        self.medium = medium
        self.deadline_s, self.lookup_deadline_s = deadline_s, lookup_deadline_s
        self.may_load, self.may_store = may_load, may_store
        self.kv_events = kv_events
        self.index = index
        self.bit = 1 << index  # in `Entry.offered`
        # Of a page found here: tiers before this one do not have it; of those behind it nothing is
        # known
        self.found_here = ~(self.bit - 1) if fills else ~0
        self.breaker = CircuitBreaker(name, clock)
        self.trust = Trust()
        self.asked = ReuseCounter(store_threshold, max_tracker_size)
        self.loads = Traffic()
        self.stores = Traffic()
        self.queue = LoadQueue()
        self.pace = Pace(deadline_s, clock())
        self.departures = Departures(clock)
        self.promotions = Samples()  # seconds from a reservation to the end of its job
        self.answers = Samples()  # seconds until a look-up was answered, where not at once
        self.promoting = 0  # slots of the primary tier reserved for it, in time
        # Keys that did not arrive -> number of the newest request then: those that waited for
        # the page ask elsewhere, later ones may try again
        self.lost: OrderedDict[bytes, int] = OrderedDict()
        self.recent: deque[Entry] = deque(maxlen=16)  # pages it was given or gave
        self.stores_failing = False  # nothing of its last store was stored, whatever the cause
        self.overdue_jobs = 0
        self.declined = 0  # requests that computed what they could have loaded

    def lose(self, key: bytes, number: int) -> None:
        """A page did not arrive, when the newest request was this one."""
        self.lost.pop(key, None)
        self.lost[key] = number
        if len(self.lost) > MAX_LOST:
            self.lost.popitem(last=False)

    def ahead(self, req_id: str, nbytes: int) -> int:
        """Bytes that it loads until so many more of a request have arrived."""
        return self.loads.nbytes + self.queue.ahead(req_id, nbytes)

    def traffic(self, *, promotion: bool) -> Traffic:
        """Loads for a promotion, else stores."""
        return self.loads if promotion else self.stores
