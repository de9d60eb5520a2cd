"""The I/O process: moves pages between a medium and the page region it shares with the engine.

Started by `process.IoProcess` as `python -m kvstrata.tiers.process.worker SOCKET REGION LINE BELL`
with four descriptors. It ends when the engine says so. When the engine is gone without a word it
writes what it was given, within seconds (see survival.py), or the kernel kills it with the engine,
where nobody could read the pages.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import pkgutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from queue import SimpleQueue

from kvstrata.tiers.base import PageKey, key_group
from kvstrata.tiers.machine.liveness import process_state
from kvstrata.tiers.page.identity import is_key
from kvstrata.tiers.process.bell import Bell
from kvstrata.tiers.process.medium import (
    Medium,
    News,
    Outcome,
    PageRef,
    attempt,
    failed,
)
from kvstrata.tiers.process.messages import (
    MAX_PACKET,
    MAX_SETUP,
    MOST_NEWS,
    MOST_SAMPLES,
    WRITES,
    Complete,
    Done,
    Failure,
    Figures,
    Kind,
    Notice,
    Ready,
    Record,
    Setup,
    Task,
    Told,
    Trusted,
    Upkeep,
    pack,
    packet,
    short,
    short_cause,
    unpack_tasks,
)
from kvstrata.tiers.process.pool import Pool
from kvstrata.tiers.process.survival import (
    end_in_time,
    end_on_the_second_signal,
    leave_family,
    packets,
    wake_at_the_end_of,
    watch,
)

_PR_SET_PDEATHSIG = 1  # prctl(2), linux/prctl.h
_BEHIND_BYTES = 2**20  # queued for the engine: it was idle for long


class Outbox:
    """Sends records to the engine at once, or where that would wait from a thread of its own.

    What a medium knows as its `Host`; see there.
    """

    def __init__(self, control: socket.socket, bell: Bell) -> None:
        self._control = control
        self._bell = bell
        self._records: SimpleQueue[bytes | None] = SimpleQueue()
        self._queued = 0  # bytes
        self._count_lock = threading.Lock()
        self._known: set[str] = set()
        self._sender = threading.Thread(target=self._send, name="kvstrata-io-send", daemon=True)
        self._sender.start()

    def put(self, record: Record) -> None:
        """Send a record some time soon, after those put before."""
        packed = pack(record)
        with self._count_lock:
            if not self._queued and self._send_at_once(packed):
                return
            self._queued += len(packed)
            self._records.put(packed)

    def _send_at_once(self, packed: bytes) -> bool:
        """Another thread for it would cost as much as a third of a page's other work."""
        try:
            self._control.send(packet([packed]), socket.MSG_DONTWAIT)
        except OSError:  # it would wait, or the engine is gone: that is for the other thread to see
            return False
        self._bell.ring()
        return True

    @property
    def is_behind(self) -> bool:
        return self._queued > _BEHIND_BYTES

    def report(self, cause: str, detail: str) -> None:
        """Not counted while the engine is behind."""
        if self.is_behind:
            return
        cause = short_cause(cause)
        self.put(Failure(cause, "" if cause in self._known else short(detail)))
        self._known.add(cause)

    def tell(self, news: Sequence[News]) -> None:
        """What is no key is dropped."""
        keys = [each for each in news if is_key(each[0])]
        for start in range(0, len(keys), MOST_NEWS):
            self.put(Told(keys[start : start + MOST_NEWS]))

    def complete(self, complete: bool) -> None:
        self.put(Complete(complete))

    def upkeep(self, done: Mapping[str, int]) -> None:
        self.put(Upkeep(dict(done)))

    def figures(
        self, gauges: Mapping[str, float], samples: Mapping[str, Sequence[float]] = {}
    ) -> None:
        lists = {name: list(values)[:MOST_SAMPLES] for name, values in samples.items()}
        self.put(Figures(dict(gauges), lists))

    def say(self, text: str) -> None:
        self.put(Notice(short(text)))

    def trust(self, trusted: bool) -> None:
        self.put(Trusted(trusted))

    def close(self) -> None:
        """Wait until all is sent."""
        self._records.put(None)
        self._sender.join()

    def _send(self) -> None:
        with suppress(ConnectionError):  # the engine is gone
            while records := self._take():
                self._control.send(packet(records))
                self._bell.ring()
                with self._count_lock:
                    self._queued -= sum(map(len, records))

    def _take(self) -> list[bytes]:
        """Wait for records; what there is, up to about a packet. None after `close`."""
        records: list[bytes] = []
        size = 0
        while size < MAX_PACKET // 2 and (not records or not self._records.empty()):
            record = self._records.get()
            if record is None:
                self._records.put(None)
                break
            records.append(record)
            size += len(record)
        return records


class Mover:
    """Does tasks, on any thread."""

    def __init__(self, setup: Setup, medium: Medium, outbox: Outbox) -> None:
        self._medium = medium
        self._outbox = outbox
        self._region = setup.region
        self._sizes = {group: each.nbytes for group, each in setup.context.layouts.items()}
        self._memory = memoryview(mmap.mmap(setup.region.fd, 0))

    def run(self, task: Task) -> None:
        """Do it, and say what became of the pages."""
        start = time.monotonic()
        try:
            self._end(task, self._outcomes(task), start)
        except Exception as error:  # what the medium returned is no outcome, or has wrong fields
            self._outbox.report("internal", f"{type(error).__name__}: {error}")
            self._end(task, [Outcome("internal")] * len(task.keys), start)

    def drop(self, task: Task) -> None:
        """Say that it was not done."""
        self._end(task, [Outcome("shutdown")] * len(task.keys), time.monotonic())

    def _end(self, task: Task, outcomes: list[Outcome], start: float) -> None:
        if outcomes.count(outcomes[0]) == len(outcomes):
            outcomes = outcomes[:1]
        self._outbox.put(Done(task.task_id, outcomes, start, time.monotonic()))

    def _outcomes(self, task: Task) -> list[Outcome]:
        """What became of the pages; failures are reported."""
        try:
            outcomes = list(self._move(task))
            if len(outcomes) != len(task.keys):
                raise ValueError(f"{len(outcomes)} outcomes of {len(task.keys)} pages")
        except Exception as error:
            outcomes = [failed(error)] * len(task.keys)
        for index, found in enumerate(outcomes):
            if found.cause is not None:
                self._outbox.report(found.cause, _detail(task.keys[index], found))
                cause = short_cause(found.cause)
                outcomes[index] = Outcome(cause, found.moved, found.gone, found.stuck)
        return outcomes

    def _move(self, task: Task) -> Sequence[Outcome]:
        if task.kind is Kind.CHECK:
            found = self._medium.exists(task.keys)
            return [Outcome(moved=bool(each)) for each in found]
        pages = task.pages()
        views = list(map(self._view, task.keys, task.slots))
        if task.kind is Kind.LOAD:
            return self._medium.load_many(pages, views, task.access)
        if task.kind is Kind.STORE:
            return self._medium.store_many(pages, views, task.access)
        distrust = task.kind is Kind.DISTRUST
        return [self._reject(*each, distrust) for each in zip(pages, views, strict=True)]

    def _reject(self, page: PageRef, computed: memoryview, distrust: bool) -> Outcome:
        found = attempt(self._medium.reject, page, computed, distrust)
        if found.cause is None:
            return found
        return Outcome(found.cause, gone=True, stuck=True, detail=found.detail)

    def _view(self, key: PageKey, slot: int) -> memoryview:
        start = self._region.offset + slot * self._region.slot_bytes
        return self._memory[start : start + self._sizes[key_group(key)]]


def _quieten_libraries() -> None:
    """Drop what is written to descriptor 2, which Python's own errors leave for another.

    Some libraries write each failure there and ask nobody; here they are counted, and said once.
    """
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _detail(key: PageKey, found: Outcome) -> str:
    """What is known of a failure; where it is the page's, with its key."""
    digits = key[:-4].hex()
    if not found.gone or digits in found.detail:
        return found.detail
    return f"{found.detail or 'it is not there'} (page {digits})"


def serve(setup: Setup, control: socket.socket, bell: Bell, region_fd: int) -> None:
    """Do the engine's tasks until it says that it is enough, or is gone."""
    outbox = Outbox(control, bell)
    outbox.put(Ready())
    if setup.medium.noisy:
        _quieten_libraries()
    factory = pkgutil.resolve_name(setup.medium.factory)
    medium: Medium = factory(setup.medium.options, setup.context, outbox, setup.readers)
    mover = Mover(setup, medium, outbox)
    os.close(region_fd)
    pool = Pool(setup.threads, setup.readers, mover.run, mover.drop)
    finish = False

    def guarded(call: Callable[..., None], *arguments: object) -> None:
        try:
            call(*arguments)
        except Exception as error:
            outbox.report("internal", f"{type(error).__name__}: {error}")

    for raw in packets(control):
        for task in unpack_tasks(raw):
            if task.kind is Kind.FINISH:
                finish = True
            elif task.kind is Kind.USE:
                guarded(medium.used, task.keys, task.access)
            elif task.kind is Kind.PROMISE:
                guarded(medium.promised, task.keys, task.access)
            else:
                pool.submit(task, task.kind in WRITES)
    if not finish:
        end_in_time()
    pool.close(end_writes=not finish)
    pool.wait_idle()
    guarded(medium.close)
    if finish:
        outbox.close()


def main() -> None:
    """See the module's text."""
    fds = list(map(int, sys.argv[1:]))
    for fd in fds:
        os.set_inheritable(fd, False)
    control, (region_fd, line), bell = socket.socket(fileno=fds[0]), fds[1:3], Bell(fds[3])
    os.close(fds[3])
    setup: Setup = pickle.loads(control.recv(MAX_SETUP))
    if not setup.outlives:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    started = process_state(setup.engine)[1]
    if os.getppid() != setup.engine:
        return  # it died before it was watched
    if setup.outlives:
        leave_family()
        end_on_the_second_signal()
        wake_at_the_end_of(line)
        watch(setup.engine, started, control)
    with suppress(ConnectionError):  # the engine is gone
        control.send(str(os.getpid()).encode())
        bell.ring()
    serve(setup, control, bell, region_fd)
    os._exit(0)  # all is done, and the interpreter's own end takes a while


if __name__ == "__main__":
    main()
