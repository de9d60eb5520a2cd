"""What the manager remembers of a request until it ends."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvstrata.offload.costs import Progress
from kvstrata.offload.wishes import NO_WISHES, Wishes
from kvstrata.tiers.base import RequestView


@dataclass(slots=True)
class RequestState:
    """What is remembered of a request until it ends."""

    view: RequestView
    number: int = 0  # in the order of arrival
    wishes: Wishes = NO_WISHES
    # (tier index, key) not to be tried for this request, as loading it was not worth it
    unworthy: set[tuple[int, bytes]] = field(default_factory=set)
    # (tier index, key) -> when the tier first answered RETRY
    first_retry: dict[tuple[int, bytes], float] = field(default_factory=dict)
    silent: set[int] = field(default_factory=set)  # tiers past their look-up deadline
    # tier index -> pages to load although it does not seem worth it; usually none
    trying: dict[int, int] = field(default_factory=dict)
    sources: dict[bytes, str] = field(default_factory=dict)  # promoted key -> tier name
    waits_since: float = 0.0  # since when it waits for promotions, step by step
    waited_in: int = -2  # the last step in which it did
    awaits: bool = False  # some look-up of this step was answered RETRY
    progress: Progress | None = None  # of its prefill
    open_stores: int = 0
    finished: bool = False
