"""The line that a server logs once a minute while there is traffic: whether it pays."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from kvstrata.offload.metering.found import Takings
from kvstrata.offload.metering.names import PRIMARY
from kvstrata.tiers.options import format_bytes

logger = logging.getLogger("kvstrata")


class MinuteLog:
    """Logs what requests found since the last line, what it saved, and what the tiers hold.

    Args:
        every_s: seconds between two lines; 0: none is logged.
        clock: seconds, monotonic.
    """

    def __init__(self, every_s: float, clock: Callable[[], float]) -> None:
        self._every_s = every_s
        self._clock = clock
        self._since: float | None = None
        self._queried = 0
        self._hits: dict[str | None, int] = {}
        self._saved = 0.0

    def look(
        self,
        takings: Mapping[str | None, Takings],
        saved_s: float | None,
        held: Mapping[str, tuple[float, float]],
    ) -> None:
        """Log the line if it is time, and something was looked for.

        Args:
            takings: by tier, None for the primary one.
            saved_s: seconds of prefill saved, net of waiting, in all; None if not known.
            held: by tier's name, bytes that it holds, and may hold (0: no limit).
        """
        now = self._clock()
        if self._since is None:
            self._since = now
        seconds = now - self._since
        if not self._every_s or seconds < self._every_s:
            return
        queried = takings[None].query_chunks - self._queried
        if queried:
            found = {
                name or PRIMARY: each.hit_chunks - self._hits.get(name, 0)
                for name, each in takings.items()
            }
            tiers = ", ".join(f"{name} {hits:,}" for name, hits in found.items())
            saved = "not known yet" if saved_s is None else f"{saved_s - self._saved:,.1f} s"
            logger.info(
                "kvstrata: in %.0f s %s of %s chunks were found (%s); prefill saved, less waits: "
                "%s; held: %s",
                seconds,
                f"{sum(found.values()):,}",
                f"{queried:,}",
                tiers,
                saved,
                ", ".join(f"{name} {_size(*each)}" for name, each in held.items()),
            )
        self._since, self._queried = now, takings[None].query_chunks
        self._hits = {name: each.hit_chunks for name, each in takings.items()}
        self._saved = saved_s or 0.0


def _size(nbytes: float, limit: float) -> str:
    return format_bytes(int(nbytes)) + (f" of {format_bytes(int(limit))}" if limit else "")
