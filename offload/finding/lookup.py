"""TierLookup: asks the secondary tiers for a page that the primary tier does not have."""

from __future__ import annotations

import enum
import logging

from kvstrata.offload.context import Context
from kvstrata.offload.finding.promotion import Promotions
from kvstrata.offload.request.request import RequestState
from kvstrata.offload.secondary.breaker import Operation
from kvstrata.offload.secondary.tier import TierLink
from kvstrata.tiers.base import Lookup

logger = logging.getLogger("kvstrata.manager")


class Answer(enum.Enum):
    """What a look-up says; PENDING will become HIT or MISS in bounded time."""

    HIT = enum.auto()
    MISS = enum.auto()
    PENDING = enum.auto()  # the page is coming
    RETRY = enum.auto()  # a tier does not know yet


# Members bound once: in Python 3.11 each `Lookup.HIT` is a call.
_HIT, _RETRY, _MISS = Lookup.HIT, Lookup.RETRY, Answer.MISS


class TierLookup:
    """Asks the tiers in their order; the first that has the page begins to promote it."""

    def __init__(self, context: Context, promotions: Promotions) -> None:
        self._context = context
        self._jobs, self._waits = context.jobs, context.waits
        self._promotions = promotions
        self._awaiting: list[RequestState] = []  # requests with a RETRY in this step
        self.step = 0  # counts up

    def ask(self, key: bytes, end_token: int, state: RequestState) -> Answer:
        """PENDING, RETRY or MISS; see `TieringManager.lookup`."""
        request = state.view
        allowed, silent, unworthy = request.tiers, state.silent, state.unworthy
        patience = 0.0  # for the answers of the tiers that do not know yet
        for link in self._jobs.sources:
            index = link.index
            if (
                not link.breaker.closed
                or link.trust.lost
                or (allowed is not None and link.name not in allowed)
            ):
                continue
            if index in silent or (unworthy and (index, key) in unworthy):
                continue
            if link.lost and link.lost.get(key, -1) >= state.number:
                continue
            if not self._promotions.may_pay(link, key, state):
                continue
            found = link.tier.lookup(key, request)
            if found is _RETRY:
                if self._may_wait(link, key, state):
                    patience = max(patience, link.deadline_s)
                continue
            if state.first_retry:
                since = state.first_retry.pop((index, key), None)
                if since is not None:
                    link.answers.add((self._context.clock() - since,))
            if link.breaker.doubtful:
                link.breaker.succeeded(Operation.LOOKUP)
            if found is _HIT and not patience:
                if state.awaits:
                    # Behind an undecided key nothing is reserved: the prefix may end there.
                    patience = link.deadline_s
                    break
                reserved = self._promotions.reserve(link, key, end_token, state)
                return Answer.PENDING if reserved else Answer.MISS
        if patience and self._waits.goes_on(state, end_token, patience):
            state.awaits = True
            self._awaiting.append(state)
            return Answer.RETRY
        state.missed(end_token, self.step)
        return _MISS

    def end_step(self) -> None:
        """The step ended, and with it what its look-ups have in common."""
        for state in self._awaiting:
            state.awaits = False
        self._awaiting.clear()
        self.step += 1

    def _may_wait(self, link: TierLink, key: bytes, state: RequestState) -> bool:
        """Whether the request may still wait for the tier's answer."""
        config, counters = self._context.config, self._context.report.counters
        deadline_s = link.lookup_deadline_s or config.lookup_deadline_s
        now = self._context.clock()
        since = state.first_retry.setdefault((link.index, key), now)
        if now - since < deadline_s:
            return True
        state.silent.add(link.index)
        link.breaker.failed(Operation.LOOKUP)
        if not counters["lookup_timeouts"]:
            logger.warning(
                "tier %s did not answer a look-up within %g s; requests go on without it "
                "(logged once; counted from now on as lookup_timeouts)",
                link.name,
                deadline_s,
            )
        counters["lookup_timeouts"] += 1
        return False
