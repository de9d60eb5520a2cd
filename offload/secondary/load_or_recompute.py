"""LoadOrRecompute: load a prefix from a secondary tier, or let the engine compute it?

Both are measured in the engine: what a tier's loads took, from submission to arrival, and how
fast a request's prefill advances. The copy from the primary tier to the GPU is not weighed: it
is needed for any load, and is an order of magnitude faster than prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvstrata.offload.request.request import RequestState
from kvstrata.offload.secondary.costs import PrefillSpeed
from kvstrata.offload.secondary.tier import TierLink

# A load must be expected to take at most this share of the time to compute the same: besides the
# way to the primary tier it costs a step until its arrival is seen, and the copy to the GPU.
WORTH_IT = 0.8
# One in so many requests loads although it does not seem to pay, to see whether it does now,
# but only so many pages.
TRY_EVERY = 32
TRY_PAGES = 4


class Candidate(NamedTuple):
    """A page that could be loaded: from where, its bytes, and the tokens it spares."""

    link: TierLink
    nbytes: int
    tokens: int


class LoadOrRecompute:
    """Compares loading with computing. Until enough was measured, loading always pays.

    Args:
        enabled: the key `load_or_recompute`; False: loading always pays.
        speed: the engine's prefill speed.
    """

    def __init__(self, enabled: bool, speed: PrefillSpeed) -> None:
        self._enabled = enabled
        self._speed = speed
        self._per_token: float | None = None  # seconds that loading one may take

    @property
    def weighs(self) -> bool:
        """Whether anything is weighed in this step."""
        return self._per_token is not None

    def end_step(self) -> None:
        """A step ended: take what was measured into account."""
        if self._enabled and (per_token := self._speed.seconds_per_token()) is not None:
            self._per_token = WORTH_IT * per_token

    def may_pay(self, candidate: Candidate, state: RequestState) -> bool:
        """Whether a page could pay as one of very many, when the latency does not count."""
        if self._per_token is None or not candidate.link.loads.cost.known:
            return True
        if (
            candidate.link.loads.cost.seconds_per_byte * candidate.nbytes
            <= self._per_token * candidate.tokens
        ):
            return True
        return self._pages_to_try(candidate.link, state) > 0

    def worth(self, candidates: Sequence[Candidate], state: RequestState, *, in_order: bool) -> int:
        """How many of the first candidates of a prefix to load so that most time is spared.

        `in_order`: a prefix of the candidates is of use; otherwise only all of them together.
        """
        if self._per_token is None:
            return len(candidates)
        best, most_spared = 0, 0.0
        own: dict[TierLink, int] = {}
        waits: dict[TierLink, float] = {}  # tiers load at the same time
        compute = 0.0
        for count, candidate in enumerate(candidates, 1):
            link = candidate.link
            own[link] = own.get(link, 0) + candidate.nbytes
            waits[link] = link.loads.cost.seconds(link.ahead(state.view.req_id, own[link]))
            compute += candidate.tokens * self._per_token
            spared = compute - max(waits.values())
            if spared >= most_spared and (in_order or count == len(candidates)):
                best, most_spared = count, spared
        if best == len(candidates):
            return best
        tried = self._pages_to_try(candidates[best].link, state)
        return min(best + tried, len(candidates)) if in_order or not tried else len(candidates)

    def _pages_to_try(self, link: TierLink, state: RequestState) -> int:
        """Count a request that is to compute instead; how many pages it may load all the same."""
        pages = state.trying.get(link.index)
        if pages is None:
            link.declined += 1
            pages = state.trying[link.index] = 0 if link.declined % TRY_EVERY else TRY_PAGES
        return pages
