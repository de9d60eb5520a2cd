"""Waits: how long a request may wait, whatever it waits for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvstrata.offload.primary.slots import Awaited, Entry
from kvstrata.offload.request.request import RequestState

# Of the deadline, where a request waits for pages of several groups: from then on it takes no
# page more behind the first that is missing. The rest of the time is for the other groups' pages
# before it: vLLM asks for a sliding window only where it knows the prefix to end.
SEVERAL_GROUPS = 0.8


@dataclass(slots=True, eq=False)
class Waits:
    """The clocks of waiting requests and of pages that the GPU fills."""

    deadline_s: float  # the engine's `promotion_deadline_s`, and that of the GPU's pages
    _clock: Callable[[], float]  # seconds, monotonic
    _step: int = 0
    cuts: list[RequestState] = field(default_factory=list)  # waiting requests that have one
    waited: float = 0.0  # seconds, by all requests together: for tiers, and for the GPU's copy

    def left(self, state: RequestState) -> float:
        """Seconds that a request still has, as of its last `goes_on`."""
        return state.patience - (state.waited_at - state.waits_since)

    def is_first(self, state: RequestState) -> bool:
        """Whether the request has not been told to wait in this step."""
        return state.waited_in != self._step

    def goes_on(self, state: RequestState, end_token: int, deadline_s: float) -> bool:
        """Whether the request may wait (on) for a page that ends there, and has this deadline.

        It may wait for the longest deadline of all that it waits for in a row, until it loads or
        computes; vLLM need not ask in each step.
        """
        now = self._clock()
        if not state.waits:
            state.waits, state.waits_since = True, now
            state.cut, state.groups, state.patience = None, frozenset(), 0.0
        state.patience = max(state.patience, deadline_s)
        state.waited_in, state.waited_at = self._step, now
        waited = now - state.waits_since
        if len(state.groups) > 1 and waited >= SEVERAL_GROUPS * state.patience:
            if state.cut is None:
                state.cut = end_token
            if state not in self.cuts:
                self.cuts.append(state)
            if end_token >= state.cut:
                return False
        return waited < state.patience

    def end(self, state: RequestState) -> None:
        """The request waits for nothing more: it loads, computes, or has ended."""
        if state.waits:
            state.waits = False
            self.waited += self._clock() - state.waits_since

    def load(self, state: RequestState) -> None:
        """The request waits until the GPU has its pages."""
        self.end(state)
        state.loads_since = self._clock()

    def loaded(self, state: RequestState) -> None:
        """The GPU has the pages, or a reset has ended the wait."""
        if state.loads_since is not None:
            self.waited += self._clock() - state.loads_since
            state.loads_since = None

    def for_gpu(self, entry: Entry, end_token: int, state: RequestState) -> bool:
        """Whether the request may wait (on) for a page that the GPU fills."""
        awaited = entry.awaited
        if awaited is None:
            awaited = entry.awaited = Awaited(self._clock(), self.deadline_s)
        awaited.late = self._is_late(awaited)
        return not awaited.late and self.goes_on(state, end_token, awaited.deadline_s)

    def for_tier(self, entry: Entry, end_token: int, state: RequestState) -> bool:
        """Whether the request may wait (on) for a page under promotion."""
        awaited = entry.awaited
        if awaited is None or self._is_late(awaited):
            return False
        if self.is_first(state):
            state.needs = awaited.req_id
        return self.goes_on(state, end_token, awaited.deadline_s)

    def _is_late(self, awaited: Awaited) -> bool:
        return awaited.late or self._clock() - awaited.since >= awaited.deadline_s

    def is_cut(self, state: RequestState, end_token: int) -> bool:
        """Whether the request does without a page that ends there although it has arrived.

        Its prefix must not grow while it waits for the other groups' pages at its end.
        """
        return state in self.cuts and state.cut is not None and end_token >= state.cut

    def end_step(self) -> None:
        """A step ended."""
        if self.cuts:
            self.cuts[:] = [state for state in self.cuts if state.waited_in == self._step]
        self._step += 1
