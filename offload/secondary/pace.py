"""Pace: how large a tier's load jobs are, and how many pages are under way at it.

A job has one end. Short ones let a request use what has arrived of its prefix, also where the
tier says nothing of a job before its end, and show that the tier is at work. What is under way
cannot be called back, so it is no more than keeps the tier busy.
"""

from __future__ import annotations

import math

# Of `promotion_deadline_s`: what a job should take (0.25 s of the default 10 s), and for how long
# the tier should have something to do when the scheduler looks at it (1 s, and what passes until
# it looks again). The tier's speed is measured over at least as long.
JOB_SHARE = 1 / 40
AHEAD_SHARE = 1 / 10
# Of a job, whatever the tier's speed. The scheduler spends some 10 us on a job.
MOST_PAGES = 256
# While nothing is known. A tier that takes a second for a page shows it within the deadline, and
# one that has nothing left to do at the next look is given four times as much from then on.
FIRST_PAGES = 8
FIRST_AHEAD = 128


class Pace:
    """The pace of the loads of one tier.

    Attributes:
        job: pages of a job.
        ahead: pages under way after a look.
        speed: pages per second while it was busy; None while unknown.
    """

    def __init__(self, deadline_s: float, now: float) -> None:
        """deadline_s: the tier's `promotion_deadline_s`."""
        self.job = FIRST_PAGES
        self.ahead = FIRST_AHEAD
        self.speed: float | None = None
        self.limited = False  # more pages waited than it was given
        self._job_s = deadline_s * JOB_SHARE
        self._ahead_s = deadline_s * AHEAD_SHARE
        self._since = self._last = now
        self._moved = 0  # pages, since then

    def within(self, seconds: float) -> float:
        """Pages that the tier loads in this time; infinite while its speed is unknown."""
        return math.inf if self.speed is None else seconds * self.speed

    def moved(self, pages: int) -> None:
        """So many pages have arrived, or turned out not to come."""
        self._moved += pages

    def look(self, now: float, under_way: int) -> None:
        """Take into account what has arrived; so many pages have not."""
        seconds, pause = now - self._since, now - self._last
        self._last = now
        if under_way and not (self._moved and seconds >= self._ahead_s):
            return  # too early to tell
        speed = self._moved / seconds if seconds > 0.0 else math.inf
        if under_way:
            self.speed = speed
            self.job = self._job_pages(speed)
            self.ahead = max(self.job, int(speed * (self._ahead_s + pause)))
        elif self._moved:  # it could have done more
            self.job = max(self.job, self._job_pages(speed))
            if self.speed is not None:
                self.speed = max(self.speed, speed)
            if self.limited:
                self.ahead *= 4
        self._since, self._moved = now, 0

    def _job_pages(self, speed: float) -> int:
        return max(1, int(min(MOST_PAGES, speed * self._job_s)))
