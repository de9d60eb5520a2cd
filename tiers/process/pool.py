"""The threads of an I/O process: they prefer reads, or writes, and help with the others."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")
# Of what goes first, before one of the others that wait: they come to their turn, if slowly, so
# that one which does not end hangs, and does not only wait.
_MOST_AHEAD = 8
logger = logging.getLogger("kvstrata.tiers.process")


class Pool(Generic[T]):
    """Some threads and two queues of work, one of which goes first."""

    def __init__(
        self, threads: int, reads_first: bool, run: Callable[[T], None], drop: Callable[[T], None]
    ) -> None:
        """Of each work either `run` is called, on a thread of the pool, or `drop`; once."""
        self._run, self._drop = run, drop
        self._reads: deque[T] = deque()
        self._writes: deque[T] = deque()
        self._reads_first = reads_first
        self._lock = threading.Lock()
        # One for each queued work: it wakes a thread without Python code, as a Condition would run.
        self._tokens: SimpleQueue[None] = SimpleQueue()
        self._threads = threads
        self._idle = threading.Condition(self._lock)
        self._running = 0
        self._ahead = 0  # work of the own kind that was begun while the other waited
        self._closed = False
        for index in range(threads):
            # daemon: a thread that hangs in the medium must not keep the process
            name = f"kvstrata-io-{index}"
            threading.Thread(target=self._serve, name=name, daemon=True).start()

    def submit(self, work: T, writes: bool) -> None:
        """Queue work that writes, or that reads; not after `close`."""
        with self._lock:
            (self._writes if writes else self._reads).append(work)
        self._tokens.put(None)

    def close(self, *, end_writes: bool) -> None:
        """Drop what is queued, or with `end_writes` the reads, and let the threads end.

        They do when what is running has ended, and what was not dropped.
        """
        dropped: list[T] = []
        with self._lock:
            self._closed = True
            for queue in (self._reads,) if end_writes else (self._reads, self._writes):
                dropped += queue
                queue.clear()
        for _ in range(self._threads):
            self._tokens.put(None)
        for work in dropped:
            self._drop(work)

    def wait_idle(self, timeout_s: float | None = None) -> bool:
        """Wait, at most `timeout_s` seconds, until nothing is queued or running; True if so."""
        with self._lock:
            return self._idle.wait_for(
                lambda: not (self._reads or self._writes or self._running), timeout_s
            )

    def _serve(self) -> None:
        own, other = self._reads, self._writes
        if not self._reads_first:
            own, other = other, own
        while True:
            self._tokens.get()
            with self._lock:
                if self._closed and not self._writes:
                    return
                if own and (not other or self._ahead < _MOST_AHEAD):
                    work = own.popleft()
                    self._ahead += bool(other)
                else:
                    work = other.popleft()
                    self._ahead = 0
                self._running += 1
            try:
                self._run(work)
            except BaseException:
                logger.exception("a task of an I/O process failed")
            finally:
                del work  # it may hold pages' views
                with self._lock:
                    self._running -= 1
                    if not (self._running or self._reads or self._writes):
                        self._idle.notify_all()
