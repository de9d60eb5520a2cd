"""Samples: values of which the distribution is told, since they were taken last."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

# Of one kind between two readings, which are 0.1 s apart while requests run: each becomes a
# call in the process that serves the metrics.
MOST = 256


class Samples:
    """The first values after each reading; of a rush the rest is left out."""

    def __init__(self) -> None:
        self._values: list[float] = []

    def add(self, values: Iterable[float]) -> None:
        """Something took these values, in the order of time."""
        room = MOST - len(self._values)
        if room > 0:
            self._values.extend(islice(values, room))

    def take(self) -> list[float]:
        """The values since the last call."""
        values, self._values = self._values, []
        return values
