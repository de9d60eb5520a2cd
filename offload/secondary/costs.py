"""What moving pages costs, and what computing them costs, as measured in this engine."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import combinations
from statistics import median

# Jobs remembered per tier and direction. Few, since the speed of a disk or network changes.
_JOBS = 32
# A cost is known from so many jobs on.
LEAST_JOBS = 4
_SURPRISES = 3
# The line is fitted anew when so great a part of the jobs, the inverse of this, is new.
_FITTED_ANEW = 2
# Steps of prefill remembered, and how many make the speed known.
_STEPS = 128
LEAST_STEPS = 20


@dataclass(slots=True)
class Timing:
    """Pages that a tier was asked for together, of which the last to arrive tells what it costs.

    `ahead` is the bytes loaded until then, those queued before them included. `sound`: none failed
    for a cause of the tier's.
    """

    started: float  # seconds
    ahead: int
    pages: int  # that are still to come
    sound: bool = True

    def drop(self, nbytes: int) -> None:
        """One page of so many bytes, the last but for others dropped, will not be asked for."""
        self.pages -= 1
        self.ahead -= nbytes


class TransferCost:
    """Seconds a tier takes for a number of bytes, those queued before them included.

    A straight line (latency plus bytes by bandwidth) through the last jobs, by the median of
    the slopes between them (Theil 1950, Sen 1968), so that single jobs that hang do not count;
    where that line makes no sense, one through the origin.
    """

    def __init__(self) -> None:
        self._jobs: deque[tuple[float, float]] = deque(maxlen=_JOBS)
        self._line = 0.0, 0.0  # seconds per byte, seconds
        self._new = 0  # jobs since that was fitted
        self._surprises = 0  # in a row: above zero too slow, below zero too fast

    def add(self, nbytes: int, seconds: float) -> None:
        """A job ended `seconds` after its submission, when so many bytes were under way."""
        self._note_surprise(nbytes, seconds)
        self._jobs.append((float(nbytes), seconds))
        self._new += 1

    @property
    def known(self) -> bool:
        """There were enough jobs to tell."""
        return len(self._jobs) >= LEAST_JOBS

    def seconds(self, nbytes: int) -> float:
        """Expected time from submission to end with so many bytes under way; 0.0 if unknown."""
        slope, start = self._fit()
        return start + slope * nbytes

    @property
    def seconds_per_byte(self) -> float:
        """The marginal cost: the inverse of the bandwidth in bytes/s; 0.0 if unknown."""
        return self._fit()[0]

    def _note_surprise(self, nbytes: int, seconds: float) -> None:
        """The tier became another one if job after job takes half or twice as long: begin anew."""
        expected = self.seconds(nbytes)
        sign = (seconds > 2 * expected) - (2 * seconds < expected) if self.known else 0
        self._surprises = self._surprises + sign if sign * self._surprises >= 0 else sign
        if not sign:
            self._surprises = 0
        elif abs(self._surprises) == _SURPRISES:
            self._jobs.clear()
            self._surprises = 0

    def _fit(self) -> tuple[float, float]:
        if not self.known:
            return 0.0, 0.0
        # Among many jobs a few new ones move the median little, and a fit takes 40 us.
        if self._new * _FITTED_ANEW >= len(self._jobs):
            self._new = 0
            slopes = [
                (y2 - y1) / (x2 - x1)
                for (x1, y1), (x2, y2) in combinations(self._jobs, 2)
                if x1 != x2
            ]
            slope = median(slopes) if slopes else -1.0
            start = median([seconds - slope * nbytes for nbytes, seconds in self._jobs])
            if slope < 0.0 or start < 0.0:
                slope = median([seconds / max(1.0, nbytes) for nbytes, seconds in self._jobs])
                start = 0.0
            self._line = slope, start
        return self._line


@dataclass(slots=True)
class Advance:
    """How far a request's prefill was at its last offer of pages."""

    step: int  # number of the scheduler step
    time: float  # seconds
    tokens: int  # end of what is computed by the end of that step
    run: int = 0  # steps without a gap before this one


class PrefillSpeed:
    """Tokens per second that a request gains while it is being prefilled.

    Taken from the distance between offers of successive steps. A run's first distance is left
    out: where vLLM schedules one step ahead of the GPU, it is no time at all. Decoding does
    not count, since it fills a chunk in many steps.
    """

    def __init__(self) -> None:
        self._steps: deque[tuple[int, float]] = deque(maxlen=_STEPS)  # tokens, seconds

    def advance(self, last: Advance | None, step: int, time: float, tokens: int) -> Advance:
        """Note an offer of a request whose last one was `last`; to be handed in next time."""
        if last is None or step != last.step + 1 or tokens <= last.tokens:
            return Advance(step, time, tokens)
        if last.run >= 1:
            self._steps.append((tokens - last.tokens, time - last.time))
        return Advance(step, time, tokens, last.run + 1)

    def seconds_per_token(self) -> float | None:
        """None while it is not known."""
        if len(self._steps) < LEAST_STEPS:
            return None
        tokens, seconds = map(sum, zip(*self._steps, strict=True))
        return seconds / tokens
