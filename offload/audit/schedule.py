"""When to audit: often enough to notice, seldom enough not to be noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

# An audit that nobody's recomputation brings is forced at least so often while there are hits.
LONGEST_S = 3600.0
# What forced audits recompute is at most this share of the tokens that requests compute anyway.
MOST_OF_PREFILL = 0.05
# Comparing takes at most this share of one core.
MOST_OF_CORE = 0.02
# Audits under way at once: their slots are not the requests'.
MOST_AT_ONCE = 8
# What could not be audited is not made up for without end.
_MOST_OWED = 16.0
# Where the tiers hold nothing of what is computed, they are asked again after so long.
_PAUSE_S = 0.25


@dataclass(slots=True, eq=False)
class Schedule:
    """Counts what was served, computed and audited."""

    _fraction: float  # of the pages served, those to audit; 0 turns audits off
    _clock: Callable[[], float]  # seconds, monotonic
    _owed: float = 0.0  # audits that were due and did not come
    _tokens: float = 0.0  # that may be computed again now
    _last: float = field(init=False)
    _rest_until: float = -inf
    _ask_from: float = -inf

    def __post_init__(self) -> None:
        self._last = self._clock()

    @property
    def on(self) -> bool:
        """Whether there are audits at all."""
        return self._fraction > 0.0

    def served(self, pages: int) -> None:
        """So many pages were loaded by a request."""
        self._owed = min(_MOST_OWED, self._owed + pages * self._fraction)
        if self._fraction and self._clock() - self._last >= LONGEST_S:
            self._owed = max(1.0, self._owed)
            self._tokens = inf

    def computed(self, tokens: int) -> None:
        """A request computed so many tokens that no tier gave it."""
        self._tokens += MOST_OF_PREFILL * tokens

    def is_due(self, tokens: int) -> bool:
        """Whether a page of so many tokens is to be computed again for an audit."""
        return self._owed >= 1.0 and self._tokens >= tokens

    def forced(self, tokens: int) -> None:
        """A page of so many tokens is being computed again."""
        self._owed -= 1.0
        self._last = self._clock()
        self._tokens = max(0.0, self._tokens - tokens) if self._tokens < inf else 0.0

    def has_time(self) -> bool:
        """Whether a page that is being computed in any case may be compared."""
        return self.on and self._clock() >= self._rest_until

    def may_ask(self) -> bool:
        """Whether the tiers may be asked for pages that are being computed."""
        return self._clock() >= self._ask_from

    def found_none(self) -> None:
        """The tiers hold nothing of what is being computed."""
        self._ask_from = self._clock() + _PAUSE_S

    def ended(self, seconds: float, *, forced: bool) -> None:
        """A comparison ended that took so much of a core."""
        now = self._clock()
        self._last = now
        self._rest_until = max(self._rest_until, now) + seconds / MOST_OF_CORE
        if not forced:
            self._owed = max(0.0, self._owed - 1.0)
