"""Payoff: load a prefix from a secondary tier, or let the engine compute it?

Both are measured in the engine: what a tier's loads took, from submission to arrival, and how
fast a request's prefill advances. The copy from the primary tier to the GPU is not weighed: it
is needed for any load, and is an order of magnitude faster than prefill.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvstrata.offload.costs import PrefillSpeed
from kvstrata.offload.request import RequestState
from kvstrata.offload.tier_link import TierLink

# One in so many requests loads although it does not seem to pay, to see whether it does now.
TRY_EVERY = 32


class Part(NamedTuple):
    """A page that could be loaded: from where, its bytes, and the tokens it spares."""

    link: TierLink
    nbytes: int
    tokens: int


class Payoff:
    """Compares loading with computing. Until enough was measured, loading always pays.

    Args:
        enabled: the key `load_or_recompute`; False: loading always pays.
        speed: the engine's prefill speed.
    """

    def __init__(self, enabled: bool, speed: PrefillSpeed) -> None:
        self._enabled = enabled
        self._speed = speed
        self._per_token: float | None = None  # seconds to compute one, as of this step

    def end_step(self) -> None:
        """A step ended: take what was measured into account."""
        self._per_token = self._speed.seconds_per_token() if self._enabled else None

    def may_pay(self, part: Part, state: RequestState) -> bool:
        """Whether a page could pay as one of very many, when the latency does not count."""
        if self._per_token is None or not part.link.loads.cost.known:
            return True
        if part.link.loads.cost.seconds_per_byte * part.nbytes <= self._per_token * part.tokens:
            return True
        return self._tries_anyway(part.link, state)

    def worth(self, parts: Sequence[Part], state: RequestState, *, in_order: bool) -> int:
        """How many of the first parts of a prefix to load so that most time is spared.

        `in_order`: a prefix of the parts is of use; otherwise only all of them together.
        """
        if self._per_token is None:
            return len(parts)
        best, most_spared = 0, 0.0
        ahead: dict[TierLink, int] = {}
        waits: dict[TierLink, float] = {}  # tiers load at the same time
        compute = 0.0
        for count, part in enumerate(parts, 1):
            link = part.link
            ahead[link] = ahead.get(link, link.loads.nbytes) + part.nbytes
            known = link.loads.cost.known and link.index not in state.trying
            waits[link] = link.loads.cost.seconds(ahead[link]) if known else 0.0
            compute += part.tokens * self._per_token
            spared = compute - max(waits.values())
            if spared >= most_spared and (in_order or count == len(parts)):
                best, most_spared = count, spared
        if best < len(parts) and self._tries_anyway(parts[best].link, state):
            return len(parts)
        return best

    def _tries_anyway(self, link: TierLink, state: RequestState) -> bool:
        """Count a request that is to compute instead; True if it is the one that tries."""
        if link.index in state.trying:
            return True
        if link.index in state.declined:
            return False
        state.declined.add(link.index)
        link.declined += 1
        if link.declined % TRY_EVERY:
            return False
        state.trying.add(link.index)
        return True
