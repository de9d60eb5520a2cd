"""The I/O process: moves pages between files and the page region it shares with the engine.

Started by `process.IoProcess` as `python -m kvstrata.tiers.process.worker SOCKET REGION LINE` with
three descriptors. It ends when the engine says so. When the engine is gone without a word it writes
what it was given, within seconds (see survival.py), or the kernel kills it with the engine, where
nobody could read the files.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue

from kvstrata.tiers.base import PageRegion
from kvstrata.tiers.fs.budget.member import Member
from kvstrata.tiers.fs.budget.messages import News, Upkeep
from kvstrata.tiers.fs.files.temporary import process_state, sweep
from kvstrata.tiers.fs.medium import PageFiles
from kvstrata.tiers.process.messages import (
    MAX_PACKET,
    MAX_SETUP,
    MOST_NEWS,
    READY,
    WRITES,
    Done,
    Failure,
    Kind,
    Outcome,
    PageRef,
    Setup,
    pack_done,
    pack_failure,
    pack_news,
    pack_notice,
    pack_trust,
    pack_upkeep,
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
_LOOK_FOR_TRUST_S = 0.5  # how soon a word of the operator's, or of another server, is heard


class Outbox:
    """Sends records to the engine from a thread of its own, so that no I/O thread waits."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._records: SimpleQueue[bytes | None] = SimpleQueue()
        self._queued = 0  # bytes
        self._count_lock = threading.Lock()
        self._known: set[str] = set()
        self._sender = threading.Thread(target=self._send, name="kvstrata-fs-send", daemon=True)
        self._sender.start()

    def put(self, record: bytes) -> None:
        """Send a record some time soon, after those put before."""
        with self._count_lock:
            self._queued += len(record)
        self._records.put(record)

    @property
    def is_behind(self) -> bool:
        """Whether so much waits to be sent that what can wait elsewhere should."""
        return self._queued > _BEHIND_BYTES

    def report(self, cause: str, detail: str) -> None:
        """Send a failure; the detail once per cause. Not counted while the engine is behind."""
        if self.is_behind:
            return
        self.put(pack_failure(Failure(cause, "" if cause in self._known else detail)))
        self._known.add(cause)

    def tell(self, news: Sequence[News]) -> None:
        """Send news of pages."""
        for start in range(0, len(news), MOST_NEWS):
            self.put(pack_news(news[start : start + MOST_NEWS]))

    def upkeep(self, done: Upkeep) -> None:
        """Send what the keeper did."""
        self.put(pack_upkeep(done))

    def say(self, text: str) -> None:
        """Send what the operator should know."""
        self.put(pack_notice(text))

    def close(self) -> None:
        """Wait until all is sent."""
        self._records.put(None)
        self._sender.join()

    def _send(self) -> None:
        with suppress(ConnectionError):  # the engine is gone
            while records := self._take():
                self._control.send(b"".join(records))

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
        with self._count_lock:
            self._queued -= size
        return records


@dataclass(frozen=True, slots=True)
class _Task:
    """Pages that one thread moves, one after the other."""

    task_id: int
    access: int
    pages: Sequence[PageRef]
    move: Callable[[PageRef, int], Outcome]
    outbox: Outbox

    def run(self) -> None:
        start = time.monotonic()
        self._end([self.move(page, self.access) for page in self.pages], start)

    def drop(self) -> None:
        self._end([Outcome("shutdown")] * len(self.pages), time.monotonic())

    def _end(self, outcomes: list[Outcome], start: float) -> None:
        self.outbox.put(pack_done(Done(self.task_id, outcomes, start, time.monotonic())))


class TrustWatch:
    """Tells the engine when the namespace is marked as one not to be believed, or no longer is."""

    def __init__(self, files: PageFiles, trusted: bool, outbox: Outbox) -> None:
        """trusted: what the engine knows."""
        self._files = files
        self._told = trusted
        self._outbox = outbox
        self._unmarked = False  # the mark could not be made
        self._lock = threading.Lock()

    def distrust(self) -> None:
        """Mark the namespace, now or as soon as the disk allows; any thread may."""
        with self._lock:
            self._unmarked = True
        self.look()

    def look(self) -> None:
        """Look at the disk; any thread may."""
        with self._lock:
            if self._unmarked:
                self._unmarked = not self._files.distrust()
            trusted = self._files.is_trusted()
            if trusted is not None and trusted != self._told and not self._unmarked:
                self._told = trusted
                self._outbox.put(pack_trust(trusted))


class _Mover:
    """Does the tasks, page by page."""

    def __init__(self, files: PageFiles, region: PageRegion, watch: TrustWatch) -> None:
        self._files = files
        self._watch = watch
        self._region = region
        self._memory = memoryview(mmap.mmap(region.fd, 0))

    def of_kind(self, kind: Kind) -> Callable[[PageRef, int], Outcome]:
        return {
            Kind.LOAD: self._load,
            Kind.STORE: self._store,
            Kind.CHECK: self._check,
            Kind.REJECT: self._reject,
            Kind.DISTRUST: self._distrust,
        }[kind]

    def _load(self, page: PageRef, access: int) -> Outcome:
        return self._files.load(page, self._view(page), access)

    def _store(self, page: PageRef, access: int) -> Outcome:
        return self._files.store(page, self._view(page), access)

    def _check(self, page: PageRef, access: int) -> Outcome:
        return Outcome(moved=self._files.exists(page.key))

    def _reject(self, page: PageRef, access: int) -> Outcome:
        return self._files.reject(page.key, self._view(page))

    def _distrust(self, page: PageRef, access: int) -> Outcome:
        self._watch.distrust()
        return self._reject(page, access)

    def _view(self, page: PageRef) -> memoryview:
        start = self._region.offset + page.slot * self._region.slot_bytes
        return self._memory[start : start + self._files.page_bytes(page.key)]


def open_space(setup: Setup, outbox: Outbox) -> Member | None:
    """The books, if there are any; only the writers keep them."""
    if setup.limits is None:
        return None
    config = setup.config
    return Member(
        *(config.root_dir, setup.paths.name, setup.limits, config.file_mode, config.dir_mode),
        outbox,
        keeps=not setup.readers,
        ground=setup.ground,
    )


def serve(setup: Setup, control: socket.socket, region_fd: int) -> None:
    """Do the engine's tasks until it says that it is enough, or is gone."""
    outbox = Outbox(control)
    outbox.put(READY)
    space = open_space(setup, outbox)
    files = PageFiles(
        *(setup.config, setup.context, setup.paths, setup.direct, outbox.report, space),
        ground=setup.ground,
    )
    watch = TrustWatch(files, setup.trusted, outbox)
    mover = _Mover(files, setup.region, watch)
    os.close(region_fd)
    pool = Pool(setup.threads, 0) if setup.readers else Pool(0, setup.threads)
    closing = threading.Event()

    def remove_temporaries() -> None:
        removed = sum(sweep(place, closing) for place in (files.paths.home, files.paths.pages))
        outbox.upkeep(Upkeep(swept=removed))

    def watch_trust() -> None:
        while not closing.wait(_LOOK_FOR_TRUST_S):
            watch.look()

    threading.Thread(target=watch_trust, name="kvstrata-fs-trust", daemon=True).start()
    if space is None and not setup.readers:  # else the keeper does it
        name = "kvstrata-fs-sweep"
        threading.Thread(target=remove_temporaries, name=name, daemon=True).start()
    finish = False
    for packet in packets(control):
        for kind, task_id, access, pages in unpack_tasks(packet):
            if kind is Kind.FINISH:
                finish = True
                continue
            if kind in (Kind.USE, Kind.PROMISE):
                if space is not None:
                    note(space, kind, access, pages)
                continue
            task = _Task(task_id, access, pages, mover.of_kind(kind), outbox)
            if kind in WRITES:
                pool.submit_writes([task])
            else:
                pool.submit_reads([task])
    closing.set()
    if not finish:
        end_in_time()
    pool.close(threading.TIMEOUT_MAX, end_writes=not finish)
    if space is not None:
        space.close(threading.TIMEOUT_MAX)
    if finish:
        outbox.close()


def note(space: Member, kind: Kind, access: int, pages: Sequence[PageRef]) -> None:
    """Write down what the engine says of pages."""
    for page in pages:
        if kind is Kind.PROMISE:
            space.promised(page.key, access)
        else:
            space.used(page.key, page.depth, access)


def main() -> None:
    """See the module's text."""
    control, region_fd, line = socket.socket(fileno=int(sys.argv[1])), *map(int, sys.argv[2:])
    for fd in (control.fileno(), region_fd, line):
        os.set_inheritable(fd, False)
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
    serve(setup, control, region_fd)
    os._exit(0)  # all is done, and the interpreter's own end takes a while


if __name__ == "__main__":
    main()
