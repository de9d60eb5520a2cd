"""The line that a server logs once a minute while there is traffic: whether it pays."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NamedTuple

from kvstrata.offload.metering.found import Takings
from kvstrata.offload.metering.names import PRIMARY
from kvstrata.tiers.options import format_bytes

logger = logging.getLogger("kvstrata")


class Told(NamedTuple):
    """What a line is made of.

    Attributes:
        takings: by tier, None for the primary one.
        saved_s: seconds of prefill saved, net of waiting, in all; None if not known.
        held: by tier's name, bytes that it holds, and may hold (0: no limit).
    """

    takings: Mapping[str | None, Takings]
    saved_s: float | None
    held: Mapping[str, tuple[float, float]]


class MinuteLog:
    """Logs what requests found since the last line, what it saved, and what the tiers hold.

    A thread of its own does, so that the end of a burst is told too, when no step follows it.

    Args:
        every_s: seconds between two lines; 0: none is logged.
        ask: what there is to tell; on that thread.
        clock: seconds, monotonic.
    """

    def __init__(
        self, every_s: float, ask: Callable[[], Told], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ask, self._clock = ask, clock
        self._since = clock()
        self._queried = 0
        self._hits: dict[str | None, int] = {}
        self._saved = 0.0
        self._stop = threading.Event()
        if every_s:
            self._every_s = every_s
            threading.Thread(target=self._run, name="kvstrata-minute", daemon=True).start()

    def close(self) -> None:
        """Nothing more is logged."""
        self._stop.set()

    def look(self) -> None:
        """Log a line, if anything was looked for since the last call."""
        told, now = self._ask(), self._clock()
        takings = told.takings
        queried = takings[None].query_chunks - self._queried
        if queried:
            found = {
                name or PRIMARY: each.hit_chunks - self._hits.get(name, 0)
                for name, each in takings.items()
            }
            tiers = ", ".join(f"{name} {hits:,}" for name, hits in found.items())
            known = told.saved_s is not None
            saved = f"{(told.saved_s or 0.0) - self._saved:,.1f} s" if known else "not known yet"
            logger.info(
                "kvstrata: in %.0f s %s of %s chunks were found (%s); prefill saved, less waits: "
                "%s; held: %s",
                now - self._since,
                f"{sum(found.values()):,}",
                f"{queried:,}",
                tiers,
                saved,
                ", ".join(f"{name} {_size(*each)}" for name, each in told.held.items()),
            )
        self._since, self._queried = now, takings[None].query_chunks
        self._hits = {name: each.hit_chunks for name, each in takings.items()}
        self._saved = told.saved_s or 0.0

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            with suppress(RuntimeError):  # a table of the other thread's grew: the next time, then
                self.look()


def _size(nbytes: float, limit: float) -> str:
    return format_bytes(int(nbytes)) + (f" of {format_bytes(int(limit))}" if limit else "")
