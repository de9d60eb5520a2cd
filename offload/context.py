"""What the parts of the manager work with, and what they report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kvstrata.offload.config.offload_config import OffloadConfig
from kvstrata.offload.metering.found import Found
from kvstrata.offload.primary.holds import Holds
from kvstrata.offload.primary.slots import PrimaryTier
from kvstrata.offload.request.waits import Waits
from kvstrata.offload.secondary.reuse import ReuseCounter
from kvstrata.offload.secondary.tier import TierLink
from kvstrata.offload.secondary.tiers import Running, TierJobs
from kvstrata.tiers.base import JobResult, PageLayout


class Event(NamedTuple):
    """Pages came into (or left) a tier; `tier` is None for the primary tier.

    Not `announced`: they were to come, some request waited for them perhaps, and never did.
    """

    keys: list[bytes]
    removed: bool
    tier: TierLink | None
    announced: bool = True


class Report:
    """Totals by name (`<event>` or `<event>:<tier>`), and the events not yet taken."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self.events: list[Event] = []

    def came(self, keys: list[bytes], tier: TierLink | None = None) -> None:
        """Pages came into a tier, None for the primary tier."""
        if keys:
            self.events.append(Event(keys, removed=False, tier=tier))
            if tier is not None:
                tier.departures.came(keys)

    def left(self, keys: list[bytes], tier: TierLink | None = None) -> None:
        """Pages left a tier, None for the primary tier: those were evicted."""
        if keys:
            self.events.append(Event(keys, removed=True, tier=tier))
            if tier is None:
                self.counters["evicted_pages"] += len(keys)
            else:
                tier.departures.left(keys)

    def moved(self, job: Running, result: JobResult) -> None:
        """A job of a tier ended."""
        direction, name = "promoted" if job.promotion else "cascaded", job.link.name
        self.counters[f"{direction}_pages:{name}"] += len(job.entries) - len(result.failed)
        self.counters[f"{direction}_failed:{name}"] += len(result.failed)
        self.counters[f"{direction}_bytes:{name}"] += result.nbytes
        self.counters[f"{direction}_failed_jobs:{name}"] += bool(result.failed)

    def given_up(self, keys: list[bytes]) -> None:
        """Pages of the primary tier will not come, of which no `came` was said."""
        if keys:
            self.events.append(Event(keys, removed=True, tier=None, announced=False))


@dataclass(slots=True, eq=False)
class Context:
    """What the parts of the manager have in common."""

    config: OffloadConfig
    layouts: Mapping[int, PageLayout]  # by group
    windows: Mapping[int, int]  # groups of which the end of a hit is needed only; its tokens
    clock: Callable[[], float]  # seconds, monotonic
    primary: PrimaryTier
    jobs: TierJobs
    report: Report = field(default_factory=Report)
    holds: Holds = field(init=False)
    waits: Waits = field(init=False)
    found: Found = field(init=False)
    reuse: ReuseCounter = field(init=False)  # for the engine's `store_threshold`

    def __post_init__(self) -> None:
        config, clock = self.config, self.clock
        self.holds = Holds(self.primary, config.pin_fraction, clock)
        self.waits = Waits(config.promotion_deadline_s, clock)
        self.found = Found([link.name for link in self.jobs.links], self.layouts, self.windows)
        self.reuse = ReuseCounter(config.store_threshold, config.max_tracker_size)

    @property
    def several_groups(self) -> bool:
        """Whether there are pages of several groups."""
        return len(self.layouts) > 1
