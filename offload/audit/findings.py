"""What follows from audits: different pages are refused, and tiers with several of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

from kvstrata.offload.audit.comparison import Comparison, Verdict
from kvstrata.offload.audit.trust import MOST_DIFFERENT, REMEMBERED, Trust
from kvstrata.offload.context import Report
from kvstrata.offload.primary.slots import Entry, Hold, PrimaryTier
from kvstrata.offload.secondary.tier import TierLink
from kvstrata.offload.secondary.tiers import Running, TierJobs
from kvstrata.tiers.base import JobResult, Lookup, PageKey, RequestView

logger = logging.getLogger("kvstrata.audit")

_MOST_REFUSED = 65_536  # keys; the oldest are forgotten
CPU_TIER = "CPU"


@dataclass(slots=True, eq=False)
class Findings:
    """Counts verdicts and draws the consequences."""

    _primary: PrimaryTier
    _jobs: TierJobs
    _report: Report
    _cpu: Trust = field(default_factory=Trust)
    # Tiers of which a different page was logged
    _blamed: set[str] = field(default_factory=set)
    # To be dropped once the GPU has read them
    _leaving: dict[PageKey, Entry] = field(default_factory=dict)
    # Keys that are neither loaded nor stored any more -> whether a tier still has such a page
    refused: dict[PageKey, bool] = field(default_factory=dict)
    largest_error: float = 0.0

    @property
    def distrusted(self) -> list[str]:
        """The tiers from which nothing is loaded until the operator confirms."""
        names = [link.name for link in self._jobs.links if link.trust.lost]
        return [CPU_TIER, *names] if self._cpu.lost else names

    @property
    def block_some(self) -> bool:
        """Whether there are pages in the primary tier that must not be loaded."""
        return self._cpu.lost or bool(self._leaving)

    def blocks(self, key: PageKey) -> bool:
        """Whether the page must not be loaded, although the primary tier may have it."""
        return self._cpu.lost or key in self._leaving

    def judge(
        self, key: PageKey, computed: Entry, link: TierLink | None, found: Comparison
    ) -> None:
        """A page was compared.

        Args:
            key: the page's.
            computed: the engine's page, held for this call.
            link: where the page is from that would have been served; None: the primary tier.
            found: the result.
        """
        counters = self._report.counters
        counters["audit_pages"] += 1
        self.largest_error = max(self.largest_error, found.error)
        different = found.verdict is Verdict.DIFFERENT
        counters["audit_close"] += found.verdict is Verdict.CLOSE
        counters["audit_different"] += different
        trust = link.trust if link is not None else self._cpu
        lost = trust.note(different=different)
        if different:
            self._refuse(key, link, found)
            self._quarantine(key, computed, link, distrust=lost)
        if lost:
            self._distrust(link)

    def end_step(self) -> None:
        """Drop what could not leave before, and see which tiers the operator trusts."""
        if self._leaving:
            left, self._leaving = self._leaving, {}
            self._drop(left.values())
        for link in self._jobs.links:
            if link.tier.trusted == link.trust.lost:
                if link.trust.lost:
                    link.trust.restore()
                    self._blamed.discard(link.name)
                    logger.warning("tier %s is trusted again", link.name)
                else:
                    link.trust.lost = True
                    self._drop_promoted(link)

    def clear(self) -> None:
        """A reset: the primary tier forgets all its pages, and so is as good as new. What a tier
        could not put aside is still there, and stays refused."""
        self._leaving.clear()
        self._cpu.restore()
        self._blamed.discard(CPU_TIER)
        for key in [key for key, stays in self.refused.items() if not stays]:
            del self.refused[key]

    def _refuse(self, key: PageKey, link: TierLink | None, found: Comparison) -> None:
        """Neither load nor store the page any more."""
        name = link.name if link is not None else CPU_TIER
        log = logger.debug if name in self._blamed else logger.error
        self._blamed.add(name)
        log(
            "audit: page %s of the %s tier is NOT what this engine computes: relative error %.3g "
            "(%s). It is refused, and where the tier can it is kept in quarantine beside the "
            "computed one. Look at what differs between the engines that share these pages: "
            "weights, revision, configuration, versions (kvstrata inspect). Logged once per tier; "
            "counted as audit_different",
            key.hex(),
            name,
            found.error,
            found.where,
        )
        self.refused[key] = False
        if len(self.refused) > _MOST_REFUSED:
            del self.refused[next(iter(self.refused))]
        entry = self._primary.get(key)
        if entry is not None:
            self._drop([entry])

    def _quarantine(
        self, key: PageKey, computed: Entry, blamed: TierLink | None, *, distrust: bool
    ) -> None:
        """Have the page put aside by every tier that holds it, together with the computed one."""
        view = RequestView("audit")
        for link in self._jobs.links:
            if link is not blamed and link.tier.lookup(key, view) is not Lookup.HIT:
                continue
            self._primary.hold((computed,), Hold.AUDIT)
            end = partial(self._let_go, computed)
            doubt = distrust and link is blamed
            if not self._jobs.reject(link, computed, view, distrust=doubt, on_end=end):
                self.refused[key] = True
                self._primary.let_go((computed,), Hold.AUDIT)

    def _let_go(self, computed: Entry, job: Running, result: JobResult) -> None:
        if result.failed and computed.key in self.refused:
            self.refused[computed.key] = True
        self._primary.let_go((computed,), Hold.AUDIT)

    def _distrust(self, link: TierLink | None) -> None:
        remedy = "Restart the engine to use it again."
        if link is not None:
            self._drop_promoted(link)
            remedy = link.tier.how_to_trust()
        logger.error(
            "audit: %d of the last %d audited pages of the %s tier were different: nothing is "
            "loaded from it or stored in it until you confirm that it may be. %s",
            MOST_DIFFERENT,
            REMEMBERED,
            CPU_TIER if link is None else link.name,
            remedy,
        )

    def _drop_promoted(self, link: TierLink) -> None:
        """Drop what the primary tier has from the tier."""
        self._drop([entry for entry in self._primary if entry.source == link.name])

    def _drop(self, entries: Iterable[Entry]) -> None:
        """Forget pages, once the GPU does not read them: vLLM will say that it did, by key."""
        for entry in entries:
            if not entry.attached:
                continue
            if entry.gpu_busy:
                self._leaving[entry.key] = entry
            else:
                self._primary.drop(entry)
                (self._report.left if entry.ready else self._report.given_up)([entry.key])
