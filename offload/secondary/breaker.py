"""CircuitBreaker: takes a sick tier out, and decides when to try it again.

The pattern is Nygard's ("Release It!", 2007): closed (in use), open (not asked at all), and,
once a back-off has passed, on trial (one probe decides).
"""

from __future__ import annotations

import enum
import logging
from collections import Counter
from collections.abc import Callable

logger = logging.getLogger("kvstrata.manager")

# So many failures of one kind in a row, with no success between them, open the breaker.
FAILURES_TO_OPEN = 3
FIRST_BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 60.0
LATE = "late"  # the cause of what did not end in time


class Operation(enum.Enum):
    """What a tier was asked for; failures of different kinds are counted apart.

    Stores that succeed say nothing of loads that hang.
    """

    LOOKUP = "look-up"
    LOAD = "load"
    STORE = "store"


class CircuitBreaker:
    """Whether one tier may be used now.

    Args:
        name: the tier's name, for the log.
        clock: seconds, monotonic.
    """

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self._name = name
        self._clock = clock
        self._failures: Counter[Operation] = Counter()  # in a row
        self._backoff_s = FIRST_BACKOFF_S
        self._retry_at: float | None = None  # None: closed
        self.closed = True  # the tier is in use; asked for every chunk, so not a property
        self._cause: Operation | None = None  # the kind that opened it last
        self.doubtful = False  # something failed since the last success of its kind
        self.openings: Counter[tuple[Operation, str]] = Counter()  # by kind and last cause

    @property
    def wants_probe(self) -> bool:
        """The tier is out, and the back-off has passed: one job may find out how it is."""
        return self._retry_at is not None and self._clock() >= self._retry_at

    def probing(self) -> None:
        """A probe is under way; if it brings no success, the next one comes later still."""
        self._backoff_s = min(2 * self._backoff_s, LONGEST_BACKOFF_S)
        self._retry_at = self._clock() + self._backoff_s

    def probe_succeeded(self) -> None:
        """Use the tier again, on trial: what opened the breaker opens it again at once."""
        if self._retry_at is not None and self._cause is not None:
            self._close()
            self._failures[self._cause] = FAILURES_TO_OPEN - 1

    def try_again(self) -> None:
        """Where nothing can be a probe: use the tier on trial, if the back-off has passed."""
        if self.wants_probe:
            self.probing()
            self.probe_succeeded()

    def succeeded(self, kind: Operation) -> None:
        """The tier did, perhaps late, what it was asked for."""
        if not self.doubtful and self._cause is None:
            return  # as a rule
        self._failures[kind] = 0
        self.doubtful = any(self._failures.values())
        if kind is self._cause:
            self._cause = None
            self._backoff_s = FIRST_BACKOFF_S
            if self._retry_at is not None:
                self._close()

    def failed(self, kind: Operation, cause: str = LATE) -> None:
        """The tier did not do what it was asked for, or not in time; `cause`: a short word."""
        self._failures[kind] += 1
        self.doubtful = True
        if self._retry_at is not None or self._failures[kind] < FAILURES_TO_OPEN:
            return
        self._cause = kind
        self._retry_at = self._clock() + self._backoff_s
        self.closed = False
        self.openings[kind, cause] += 1
        logger.warning(
            "tier %s: %d %ss in a row failed or came too late (the last one: %s); it is left alone "
            "for %g s",
            self._name,
            FAILURES_TO_OPEN,
            kind.value,
            cause,
            self._backoff_s,
        )

    def _close(self) -> None:
        self._retry_at = None
        self.closed = True
        logger.warning("tier %s is in use again", self._name)
