"""What the manager remembers of a request until it ends."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvstrata.offload.primary.eviction.order import Use
from kvstrata.offload.request.parameters import NO_PARAMETERS, Parameters
from kvstrata.offload.secondary.costs import Advance
from kvstrata.tiers.base import RequestView


@dataclass(slots=True, eq=False)
class RequestState:
    """What is remembered of a request until it ends."""

    view: RequestView
    number: int = 0  # in the order of arrival
    parameters: Parameters = NO_PARAMETERS
    # (tier index, key) not to be tried for this request, as loading it was not worth it
    unworthy: set[tuple[int, bytes]] = field(default_factory=set)
    # (tier index, key) -> when the tier first answered RETRY
    first_retry: dict[tuple[int, bytes], float] = field(default_factory=dict)
    silent: set[int] = field(default_factory=set)  # tiers past their look-up deadline
    # tier index -> pages to load although it does not seem worth it; usually none
    trying: dict[int, int] = field(default_factory=dict)
    sources: dict[bytes, str] = field(default_factory=dict)  # promoted key -> tier name
    waits: bool = False  # for pages, until it loads or computes
    waits_since: float = 0.0  # since when
    loads_since: float | None = None  # since when it waits for the GPU to have its pages
    patience: float = 0.0  # for how long at most: the longest deadline of what it waits for
    waited_in: int = -2  # the last step in which it did
    waited_at: float = 0.0  # when it last did
    groups: frozenset[bytes] = frozenset()  # of the pages reserved in this wait, as in their keys
    needs: str = ""  # for which request the first page that it waits for was reserved
    cut: int | None = None  # end token from which on it waits for no page any more; see `Waits`
    awaits: bool = False  # some look-up of this step was answered RETRY
    progress: Advance | None = None  # of its prefill
    # End token of the first page that was answered MISS when it was looked up last: from there on
    # it computes its pages itself
    missed_from: int | None = None
    missed_in: int = -1  # the step in which it was
    # What it will compute of its prompt though it looked it up: the step in which it did, the end
    # token of the first page, and the pages from there on
    missing: tuple[int, int, int] = (-1, 0, 0)
    open_stores: int = 0
    use: Use = field(default_factory=Use)  # of the primary tier
    coming: set[bytes] = field(default_factory=set)  # pages promoted for it and not loaded yet
    # End token of its first page that found no slot: those behind it are not stored either
    stored_until: int | None = None
    # By a tier's `TierLink.bit`: of one that wants all pages of the request, those it was given
    given: dict[int, set[bytes]] = field(default_factory=dict)
    put_off: int = 0  # how often its stores were, in a row
    finished: bool = False

    def missed(self, end_token: int, step: int) -> None:
        """A page that ends there was answered MISS in this step."""
        if step != self.missed_in or self.missed_from is None or end_token < self.missed_from:
            self.missed_from, self.missed_in = end_token, step
