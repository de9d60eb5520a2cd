"""A server that is away: the calls that would wait for it in vain end at once.

A call ends by its own timeout. Without this each of a queue's tasks would wait that long, one after
the other, and with them the CPU tier's slots that they hold.
"""

from __future__ import annotations

import time

PAUSE_S = 1.0  # for which nobody asks again


class Away:
    """Whether a server answers, as far as the threads of this process know. Any of them may ask."""

    def __init__(self) -> None:
        self._failure: Exception | None = None
        self._until = 0.0  # of the pause; monotonic
        self._answered = 0.0

    def begin(self) -> float:
        """Before a call, whose beginning it returns.

        Raises:
            Exception: what was last given to `silent`, while there is a pause.
        """
        now = time.monotonic()
        if self._failure is not None and now < self._until:
            raise self._failure.with_traceback(None)
        return now

    def answered(self) -> None:
        """A call was answered, in whatever way."""
        self._answered = time.monotonic()

    def silent(self, begun: float, failure: Exception) -> None:
        """A call was not answered in time: there is a pause, unless others were meanwhile."""
        if self._answered < begun:
            self._failure, self._until = failure, time.monotonic() + PAUSE_S
