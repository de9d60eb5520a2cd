"""Whether the weight files are still those of the start. Asked at a reset of the cache."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from kvstrata.offload.vllm_plugin.weights.source import WeightSource

logger = logging.getLogger("kvstrata")

# A file system that does not answer must not hold up the scheduler. Asking for 1,000 files takes
# some 10 ms.
DEADLINE_S = 2.0


class WeightWatch:
    """Compares the weight files with what they were. In doubt they changed.

    Args:
        entries: what `watch_entry` gave of each source at the start.
    """

    def __init__(self, entries: Sequence[Mapping[str, Any]]) -> None:
        self._sources = [WeightSource(**entry["source"]) for entry in entries]
        self._states = [entry["state"] for entry in entries]

    def changed(self) -> bool:
        """Whether they are other files now, or cannot be seen within `DEADLINE_S`; logged."""
        found: list[list[str]] = []

        def look() -> None:
            try:
                found.append([source.state() for source in self._sources])
            except Exception as error:
                found.append([str(error)])

        thread = threading.Thread(target=look, name="kvstrata-weights", daemon=True)
        thread.start()
        thread.join(DEADLINE_S)
        if found == [self._states]:
            return False
        logger.error(
            "the weight files of %s %s since this engine started, so the weights that it runs "
            "with are not known any more: pages in secondary tiers are no longer used, and those "
            "stored from now on are private to this engine until its caches are reset again; "
            "restart the engine to share pages",
            " and ".join(sorted({source.model for source in self._sources})),
            "were changed" if found else f"cannot be seen for {DEADLINE_S:g} s, or were changed",
        )
        return True


def watch_entry(source: WeightSource, state: str) -> dict[str, Any]:
    """What a `WeightWatch` in another process needs, as JSON; `state` is the source's."""
    return {"source": asdict(source), "state": state}
