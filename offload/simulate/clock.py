"""A clock that stands still until it is told to go on."""

from __future__ import annotations


class Clock:
    """Seconds since the first request of a replay; called, it says what time it is."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def reach(self, time: float) -> None:
        """Go on to a time, unless it has passed."""
        self.now = max(self.now, time)
