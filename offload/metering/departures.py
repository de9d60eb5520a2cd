"""Departures: what left a tier, how old it was, and how soon it came again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvstrata.offload.metering.samples import Samples

# Keys remembered in each of two generations, of some 200 bytes each. Where a tier holds many more
# pages, what comes again after all these departures is not noticed; by then the gap is long.
GENERATION = 2**17


class Departures:
    """The evictions of one tier.

    Args:
        clock: seconds, monotonic.

    Attributes:
        pages: how many were evicted.
        ages: seconds since a page was stored or loaded last, when it was evicted.
        gaps: the *reuse gap*: seconds from a page's departure until it was needed again.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.pages = 0
        self.ages, self.gaps = Samples(), Samples()
        # Dicts of bytes and floats are nothing to the garbage collector
        self._gone: dict[bytes, float] = {}
        self._gone_before: dict[bytes, float] = {}

    def left(self, keys: Sequence[bytes], used: Sequence[float] = ()) -> None:
        """Pages left; `used`: when they were stored or loaded last, as far as that is known."""
        now = self._clock()
        self.pages += len(keys)
        self.ages.add(now - then for then in used)
        self._gone.update(dict.fromkeys(keys, now))
        if len(self._gone) >= GENERATION:
            self._gone_before, self._gone = self._gone, {}

    def came(self, keys: Sequence[bytes]) -> None:
        """Pages came, some of them perhaps again."""
        if not (self._gone or self._gone_before):
            return
        young, old = self._gone, self._gone_before
        gone = [then for key in keys if (then := young.pop(key, None) or old.pop(key, None))]
        if gone:
            now = self._clock()
            self.gaps.add(now - then for then in gone)

    def forget(self) -> None:
        """From now on no page comes *again*: those of before are of no use, or all left at once."""
        self._gone.clear()
        self._gone_before.clear()
