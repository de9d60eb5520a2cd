"""What the manager remembers of a request until it ends."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvstrata.tiers.base import RequestView


@dataclass(slots=True)
class RequestState:
    """What is remembered of a request until it ends."""

    view: RequestView
    # (tier index, key) that did not arrive: not tried again for this request
    failed: set[tuple[int, bytes]] = field(default_factory=set)
    # (tier index, key) -> when the tier first answered RETRY
    first_retry: dict[tuple[int, bytes], float] = field(default_factory=dict)
    silent: set[int] = field(default_factory=set)  # tiers past their look-up deadline
    sources: dict[bytes, str] = field(default_factory=dict)  # promoted key -> tier name
    awaits: bool = False  # some look-up of this step was answered RETRY
    open_stores: int = 0
    finished: bool = False
