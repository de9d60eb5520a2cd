"""LateTier: stands for a tier that cannot be used yet, and looks for it in the background."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvstrata.offload.secondary.guard import GuardedTier
from kvstrata.tiers.base import (
    Job,
    JobResult,
    Lookup,
    PageKey,
    RequestView,
    SecondaryTier,
    TierConfigError,
    TierStats,
)

logger = logging.getLogger("kvstrata")

# Between two attempts: twice as long each time.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
_ABSENT = "absent"  # the cause of what cannot be stored
_STOP_S = 5.0  # for a tier that was opened when nobody wanted it any more


class LateTier(SecondaryTier):
    """Has no page and stores none. Once the tier is open, its guard guards that one instead.

    Attributes:
        guard: this one's.
    """

    guard: GuardedTier

    def __init__(
        self,
        name: str,
        cls: type[SecondaryTier],
        opens: Callable[[], SecondaryTier],
        cause: str,
    ) -> None:
        """Begin to look for the tier.

        Args:
            name: of the tier, for the log.
            cls: its class.
            opens: makes it, and raises TierConfigError where it cannot be used yet; may block.
            cause: why it cannot be used yet, as was said already.
        """
        self._name = name
        self._opens = opens
        self._cause = cause
        self.locality = cls.locality
        self.page_causes = SecondaryTier.page_causes | {_ABSENT}
        self._finished: list[JobResult] = []
        self._refused = 0
        self._lock = threading.Lock()  # for the next two
        self._found: SecondaryTier | None = None
        self._over = threading.Event()  # nobody wants the tier any more
        threading.Thread(target=self._look, name=f"kvstrata-late-{name}", daemon=True).start()

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """There are none."""

    def lookup(self, key: PageKey, request: RequestView) -> Lookup:
        return Lookup.MISS

    def submit_store(self, job: Job) -> None:
        self._refused += len(job.keys)
        self._finished.append(JobResult(job.job_id, dict.fromkeys(job.keys, _ABSENT)))

    submit_load = submit_store

    def get_finished(self) -> Sequence[JobResult]:
        finished, self._finished = self._finished, []
        return finished

    def on_step_end(self) -> None:
        """Give place to the tier, if it is there and nothing is left to say."""
        if self._found is None or self._finished:
            return
        with self._lock:
            found, self._found = self._found, None
        if found is not None:
            self.guard.adopt(found)
            logger.warning("tier %s is in use now", self._name)

    def drain(self, timeout_s: float) -> bool:
        return True

    def shutdown(self, timeout_s: float) -> bool:
        with self._lock:
            self._over.set()
            found, self._found = self._found, None
        return found is None or found.shutdown(timeout_s)

    def stats(self) -> TierStats:
        return TierStats(failures={_ABSENT: self._refused} if self._refused else {})

    def _look(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._over.wait(pause_s):
            try:
                self._hand_over(self._opens())
                break
            except TierConfigError as error:
                self._say(str(error))
            except Exception as error:  # a tier's own mistake; it may be gone the next time
                self._say(f"{type(error).__name__}: {error}")
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        # The kernel ends I/O processes with the thread that started them.
        threading.Event().wait()

    def _say(self, cause: str) -> None:
        """Log a cause that is not the one before: it may be a mistake, which no wait mends."""
        if cause != self._cause:
            self._cause = cause
            logger.warning("tier %s still cannot be used, now because of %s", self._name, cause)

    def _hand_over(self, found: SecondaryTier) -> None:
        with self._lock:
            if not self._over.is_set():
                self._found = found
                return
        found.shutdown(_STOP_S)
