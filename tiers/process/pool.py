"""Two groups of threads: one prefers reads, one prefers writes, and each helps the other."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable
from queue import SimpleQueue
from typing import Protocol

logger = logging.getLogger("kvstrata.tiers.fs")


class Task(Protocol):
    """A piece of work for the pool: either `run` or `drop` is called, once."""

    def run(self) -> None:
        """Do the work, on a thread of the pool; must not raise."""

    def drop(self) -> None:
        """The pool closed before the work began; must not raise."""


class Pool:
    """`n_read` threads that prefer the read queue and `n_write` that prefer the write queue."""

    def __init__(self, n_read: int, n_write: int) -> None:
        self._reads: deque[Task] = deque()
        self._writes: deque[Task] = deque()
        self._lock = threading.Lock()
        # One for each queued task: it wakes a thread without Python code, as a Condition would run.
        self._tokens: SimpleQueue[None] = SimpleQueue()
        self._threads = n_read + n_write
        self._idle = threading.Condition(self._lock)
        self._running = 0
        self._closed = False
        groups = [("read", n_read, self._reads, self._writes)]
        groups += [("write", n_write, self._writes, self._reads)]
        for name, count, own, other in groups:
            for index in range(count):
                # daemon: a thread that hangs in the file system must not keep the process
                threading.Thread(
                    target=self._serve,
                    args=(own, other),
                    name=f"kvstrata-fs-{name}-{index}",
                    daemon=True,
                ).start()

    def submit_reads(self, tasks: Iterable[Task]) -> None:
        """Queue tasks that readers should take first."""
        self._submit(self._reads, tasks)

    def submit_writes(self, tasks: Iterable[Task]) -> None:
        """Queue tasks that writers should take first."""
        self._submit(self._writes, tasks)

    def queued(self) -> tuple[int, int]:
        """Lengths of the read queue and of the write queue."""
        return len(self._reads), len(self._writes)

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` seconds until nothing is queued or running."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            while self._reads or self._writes or self._running:
                if not self._idle.wait(deadline - time.monotonic()):
                    return False
        return True

    def close(self, timeout_s: float, *, end_writes: bool = False) -> bool:
        """Drop what is queued, let the threads end, and wait for what is running.

        end_writes: only reads are dropped; the threads end when the writes have.
        """
        with self._lock:
            self._closed = True
            dropped = [*self._reads] if end_writes else [*self._reads, *self._writes]
            self._reads.clear()
            if not end_writes:
                self._writes.clear()
        self._put_tokens(self._threads)
        for task in dropped:
            task.drop()
        return self.wait_idle(timeout_s)

    def _submit(self, queue: deque[Task], tasks: Iterable[Task]) -> None:
        tasks = list(tasks)
        with self._lock:
            closed = self._closed
            if not closed:
                queue.extend(tasks)
        if closed:
            for task in tasks:
                task.drop()
        else:
            self._put_tokens(len(tasks))

    def _put_tokens(self, count: int) -> None:
        for _ in range(count):
            self._tokens.put(None)

    def _serve(self, own: deque[Task], other: deque[Task]) -> None:
        while True:
            self._tokens.get()
            with self._lock:
                if self._closed and not self._writes:
                    return
                task = own.popleft() if own else other.popleft()
                self._running += 1
            try:
                task.run()
            except BaseException:
                logger.exception("a task of the file system tier failed")
            finally:
                del task  # it holds a page's view
                with self._lock:
                    self._running -= 1
                    if not (self._running or self._reads or self._writes):
                        self._idle.notify_all()
