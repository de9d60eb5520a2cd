"""The I/O processes of a tier: who does what, and what happens when one fails.

Everything happens on the engine's thread, in `submit`, `look` and the two that wait.
Readers and writers are a process each, so reads do not queue behind writes; each helps the
other when it is idle and the other is not.

A process that ends, or makes no progress, is given up: killed, and replaced at once. Its
tasks end as failed only when the kernel has confirmed its death, since until then it may
still write into their pages.
"""

from __future__ import annotations

import select
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import msgspec

from kvstrata.tiers.base import PageKey
from kvstrata.tiers.process.failures import Failures
from kvstrata.tiers.process.medium import News, Outcome
from kvstrata.tiers.process.messages import (
    HEADER_BYTES,
    MAX_PACKET,
    MOST_PAGES,
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
    pack,
    packet,
    unpack_records,
)
from kvstrata.tiers.process.process import IoProcess

# Tasks sent to one process: enough to keep it busy between two steps of the scheduler, and
# what is lost at most when it fails.
MOST_SENT = 256
# The same for stores: what a process has, it also writes when the engine is killed (survival.py).
# About as much as a disk takes in that time.
MOST_STORES_SENT = 4096
# A process that ends no task for so long, or is so long over one, is given up.
STALL_S = 30.0
# The same for one that is still starting: a loaded machine takes its time.
START_S = 60.0
# Given-up processes that the kernel cannot end, in place of which no other is started.
MOST_UNDEAD = 2
# A process that fails before it ended a task is replaced after so long, twice as long each time.
RESTART_S, MOST_RESTART_S = 1.0, 60.0
_MOST_DOUBLED = 6
# Tasks for which there will be no process within this time fail.
WAIT_FOR_START_S = 5.0

_CHECK_EVERY_S = 0.25  # look for stalls
_IDLE_PACKETS = 4  # of news taken at once
_TICK_S = 1.0  # the stall clock stands still while the engine does not look


class Ended(NamedTuple):
    """A task and what became of its pages; `start` and `end` in seconds, monotonic."""

    task: Task
    outcomes: Sequence[Outcome]
    start: float
    end: float


@dataclass(slots=True)
class _Sent:
    """A task at a process, and since when it must be running (stall clock)."""

    task: Task
    running_since: float | None = None


@dataclass(slots=True)
class _Running:
    """A process and what it has to do."""

    process: IoProcess
    progress: float  # when it last ended a task, or got one while idle (stall clock)
    sent: dict[int, _Sent] = field(default_factory=dict)  # oldest first
    unsent: list[Task] = field(default_factory=list)  # chosen for it just now
    ready: bool = False  # it has started
    proven: bool = False  # it ended a task
    unheard: bool = False  # not all was taken that it said
    complete: bool = False  # it has told of all pages
    cause: str | None = None  # why it was given up

    @property
    def load(self) -> int:
        """Tasks that it has, or gets with the next packet."""
        return len(self.sent) + len(self.unsent)


class _Group:
    """The readers, or the writers."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.most_sent = MOST_SENT if setup.readers else MOST_STORES_SENT
        self.queue: deque[Task] = deque()
        self.current: _Running | None = None
        self.given_up: list[_Running] = []
        self.start_at = 0.0  # not before (time.monotonic)
        self.unproven = 0  # processes in a row that failed before they ended a task

    @property
    def busy(self) -> bool:
        """Whether tasks wait or run, or an old process may still touch pages."""
        return bool(self.queue or self.given_up or (self.current and self.current.sent))

    @property
    def ready(self) -> bool:
        """Whether its process has started."""
        return self.current is not None and self.current.ready

    def put_off(self) -> None:
        """No process is of use: start the next one later each time."""
        pause = min(RESTART_S * 2 ** min(self.unproven, _MOST_DOUBLED), MOST_RESTART_S)
        self.start_at = time.monotonic() + pause
        self.unproven += 1

    @property
    def settled(self) -> bool:
        """Whether there is nothing to do until its process says something."""
        running = self.current
        if running is None or running.unheard or running.process.broken or self.given_up:
            return False
        return not self.queue or running.load >= self.most_sent

    def running(self) -> list[_Running]:
        """All processes that may live."""
        return [*self.given_up, *([self.current] if self.current else [])]


class IoProcesses:
    """Starts the processes, gives them tasks and collects what they did."""

    def __init__(self, setup: Setup, n_read: int, n_write: int, failures: Failures) -> None:
        """Start both.

        Raises:
            OSError: a process cannot be started.
        """
        self._failures = failures
        self._readers = _Group(replace(setup, readers=True, threads=n_read))
        self._writers = _Group(replace(setup, readers=False, threads=n_write))
        self._groups = (self._readers, self._writers)
        self._ended: list[Ended] = []
        self._next_id = 0
        self._clock = 0.0
        self._looked = time.monotonic()
        self._check_at = 0.0
        self._closed = False
        self._settled, self._currents = False, list[IoProcess]()  # see `_settle`
        self._changed = False  # since the last `look`
        self._news: list[News] = []
        self.trusted = setup.medium.trusted
        self.restarts = 0
        self.upkeep: Counter[str] = Counter()  # totals of `Upkeep`
        self.gauges: dict[str, float] = {}  # of `Figures`
        self._samples: defaultdict[str, deque[float]] = defaultdict(
            partial(deque, maxlen=MOST_SAMPLES)
        )
        for group in self._groups:
            group.current = _Running(IoProcess(group.setup), self._clock)

    def submit(self, tasks: Iterable[Task]) -> None:
        """Do these tasks, reads before writes, else in their order."""
        for task in tasks:
            if self._closed:
                self._fail(task, "shutdown")
            else:
                group = self._writers if task.kind in WRITES else self._readers
                group.queue.append(task)
        self._dispatch()
        self._settled = False

    def look(self) -> bool:
        """Look after the processes, and hear them; False if nothing changed since the last call."""
        self._step()
        changed, self._changed = self._changed, False
        return changed

    def take_ended(self) -> list[Ended]:
        """The tasks that ended since the last call, as of the last `look`."""
        ended, self._ended = self._ended, []
        return ended

    @property
    def complete(self) -> bool:
        """Whether the news, as of the last `look`, tell of all pages that are there."""
        currents = [group.current for group in self._groups if group.current]
        return any(each.complete and not each.unheard for each in currents)

    def take_news(self) -> list[News]:
        """Pages that came or went without us since the last call."""
        news, self._news = self._news, []
        return news

    def take_samples(self) -> dict[str, list[float]]:
        """What the medium observed since the last call."""
        samples = {name: list(values) for name, values in self._samples.items()}
        self._samples.clear()
        return samples

    def note(self, kind: Kind, keys: list[PageKey], access: int) -> None:
        """Let it be noted that the pages were used or promised; lost if the writers are busy."""
        writers = self._writers.current
        for start in range(0, len(keys), MOST_PAGES):
            if writers is not None and not self._closed:
                task = Task(kind, keys[start : start + MOST_PAGES], access=access)
                writers.process.send(packet([pack(task)]))

    def pids(self) -> tuple[int, ...]:
        """The processes that are in use now: readers, writers."""
        return tuple(group.current.process.pid for group in self._groups if group.current)

    def unfinished(self) -> tuple[int, int]:
        """How many tasks wait or run, of the readers and of the writers."""
        reads, writes = (
            len(group.queue) + sum(len(running.sent) for running in group.running())
            for group in self._groups
        )
        return reads, writes

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` seconds until both have started; False if one will not."""

        def known() -> bool:
            return all(g.ready for g in self._groups) or any(g.unproven for g in self._groups)

        return self._wait_until(known, timeout_s) and all(g.ready for g in self._groups)

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait at most `timeout_s` seconds until nothing waits or runs."""
        return self._wait_until(lambda: not any(group.busy for group in self._groups), timeout_s)

    def stop(self) -> None:
        """Drop what waits, and let the processes end what runs and themselves."""
        if self._closed:
            return
        self._closed, self._settled = True, False
        for group in self._groups:
            while group.queue:
                self._fail(group.queue.popleft(), "shutdown")
        if self._readers.current:
            self._readers.current.process.finish()

    def close(self, timeout_s: float) -> bool:
        """`stop`, and wait at most `timeout_s` seconds for the end.

        What does not end of itself is killed. True if no process lives any more.
        """
        deadline = time.monotonic() + timeout_s
        kill_at = deadline - min(1.0, timeout_s / 2)
        self.stop()
        while True:
            self._step()
            if not any(group.running() for group in self._groups):
                return True
            now = time.monotonic()
            if self._writers.current and not self._readers.running():
                self._writers.current.process.finish()  # last: they book what the readers stored
            if now >= kill_at:
                for group in self._groups:
                    if group.current:
                        self._give_up(group, "shutdown")
            if now >= deadline:
                return False
            self._wait((deadline if now >= kill_at else kill_at) - now)

    # -- inside -------------------------------------------------------------------

    def _wait_until(self, met: Callable[[], bool], timeout_s: float) -> bool:
        """Wait at most `timeout_s` seconds until that holds; True if so."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._step()
            if met():
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._wait(left)

    def _step(self) -> None:
        now = time.monotonic()
        self._clock += min(now - self._looked, _TICK_S)
        self._looked = now
        due = self._clock >= self._check_at
        if self._settled and not due and not any([each.has_word for each in self._currents]):
            return
        self._changed = True
        for group in self._groups:
            for running in group.running():
                process = running.process
                if process.has_word or running.unheard or process.broken or due:
                    self._receive(running)
            self._bury(group)
            if group.current and (group.current.process.fd < 0 or group.current.process.broken):
                self._give_up(group, "shutdown" if self._closed else "crashed")
        if due and not self._closed:
            self._check_at = self._clock + _CHECK_EVERY_S
            for group in self._groups:
                if group.current and self._stalls(group.current):
                    self._give_up(group, "stalled")
        if not self._closed:
            for group in self._groups:
                if group.current is None:
                    self._restart(group, now)
            self._dispatch()
            if all(g.current is None and g.start_at > now + WAIT_FOR_START_S for g in self._groups):
                for group in self._groups:  # pages that wait hold memory of the engine
                    self._fail_queue(group, "crashed", "no I/O process stays alive")
        self._settle()

    def _settle(self) -> None:
        """Most steps find nothing new: see what makes the next ones short."""
        self._settled = not self._closed and all(group.settled for group in self._groups)
        self._currents = [group.current.process for group in self._groups if group.current]

    def _receive(self, running: _Running) -> None:
        running.unheard, left = False, _IDLE_PACKETS
        while (raw := running.process.receive()) is not None:
            try:
                for record in unpack_records(raw):
                    self._hear(running, record)
            except (msgspec.MsgspecError, LookupError):  # it is out of its mind
                running.process.broken = True
            left -= 1
            if left <= 0 and not (running.sent or running.cause or self._closed):
                running.unheard = True
                break  # nothing is due

    def _hear(self, running: _Running, record: Record) -> None:
        if isinstance(record, Done):
            self._end(running, record)
        elif isinstance(record, Ready):
            running.ready, running.progress = True, self._clock
        elif isinstance(record, Failure):
            self._failures.count(record.cause, record.detail)
        elif isinstance(record, Notice):
            self._failures.say(record.text)
        elif isinstance(record, Complete):
            running.complete = record.complete
        elif isinstance(record, Trusted):
            self.trusted = record.trusted
        elif isinstance(record, Told):
            self._news += record.news
        elif isinstance(record, Figures):
            self.gauges.update(record.gauges)
            for name, values in record.samples.items():
                self._samples[name].extend(values)
        else:
            self.upkeep.update(record.counts)

    def _end(self, running: _Running, done: Done) -> None:
        task = running.sent[done.task_id].task
        outcomes, pages = done.outcomes, len(task.keys)
        if len(outcomes) == 1:
            outcomes *= pages
        if len(outcomes) != pages:
            raise LookupError("not the outcomes of this task")
        del running.sent[done.task_id]
        running.progress = self._clock
        running.proven = True
        # Tasks of a kind start in order, and those of the other not much later (see `Pool`), so
        # those sent before this one must be running.
        for task_id, sent in running.sent.items():
            if task_id > done.task_id:
                break
            if sent.running_since is None:
                sent.running_since = self._clock
        self._ended.append(Ended(task, outcomes, done.start, done.end))

    def _stalls(self, running: _Running) -> bool:
        if not running.sent:
            return False
        since = [s.running_since for s in running.sent.values() if s.running_since is not None]
        limit = STALL_S if running.ready else max(START_S, STALL_S)
        return self._clock - min([running.progress, *since]) > limit

    def _give_up(self, group: _Group, cause: str) -> None:
        running, group.current = group.current, None
        assert running is not None
        running.cause = cause
        running.process.kill()
        group.given_up.append(running)
        if running.proven:
            group.start_at, group.unproven = 0.0, 0
        else:
            group.put_off()
        self._bury(group)

    def _bury(self, group: _Group) -> None:
        """End the tasks of given-up processes that are dead and have said their last."""
        for running in list(group.given_up):
            self._receive(running)  # up to the end
            status = running.process.exit_status()
            if status is None:
                continue
            group.given_up.remove(running)
            cause = running.cause or "crashed"
            pages = sum(len(sent.task.keys) for sent in running.sent.values())
            if cause != "shutdown":
                detail = f"I/O process {running.process.pid}: {status}"
                self._failures.count(cause, detail, max(pages, 1))
            for sent in running.sent.values():
                self._fail(sent.task, cause)

    def _restart(self, group: _Group, now: float) -> None:
        if len(group.given_up) >= MOST_UNDEAD:
            self._fail_queue(group, "stalled", "no I/O process answers")  # a dead file system
        elif now >= group.start_at:
            try:
                group.current = _Running(IoProcess(group.setup), self._clock)
                self.restarts += 1
            except OSError as error:
                self._failures.count("no-process", str(error))
                group.put_off()

    def _dispatch(self) -> None:
        readers, writers = self._groups
        for own, other in ((readers, writers), (writers, readers)):
            while own.queue and (running := self._choose(own, other)):
                self._next_id += 1
                task = own.queue.popleft()
                task.task_id = self._next_id
                running.unsent.append(task)
            for group in self._groups:
                if group.current and group.current.unsent:
                    self._send(group.current, own)

    def _send(self, running: _Running, own: _Group) -> None:
        """Send what was chosen for the process; what it does not take goes back to `own`."""
        unsent, running.unsent = running.unsent, []
        packed = list(map(pack, unsent))
        start = 0
        while start < len(unsent):
            end, size = start, HEADER_BYTES
            while end < len(unsent) and size + len(packed[end]) <= MAX_PACKET:
                size += len(packed[end])
                end += 1
            if not running.process.send(packet(packed[start:end])):
                own.queue.extendleft(reversed(unsent[start:]))
                return
            if not running.sent:
                running.progress = self._clock
            running.sent.update((task.task_id, _Sent(task)) for task in unsent[start:end])
            start = end

    def _choose(self, own: _Group, other: _Group) -> _Running | None:
        """Who takes the next task of `own`; None if nobody does now."""
        load = own.current.load if own.current else own.most_sent
        if other.current and not other.queue:
            theirs = other.current.load
            # half of its threads stay free for its own tasks: ours may wait, for room say
            if theirs < other.setup.threads // 2 and load > 2 * theirs + 1:
                return other.current
        return own.current if load < own.most_sent else None

    def _fail_queue(self, group: _Group, cause: str, detail: str) -> None:
        while group.queue:
            task = group.queue.popleft()
            self._failures.count(cause, detail, len(task.keys))
            self._fail(task, cause)

    def _fail(self, task: Task, cause: str) -> None:
        now = time.monotonic()
        self._ended.append(Ended(task, [Outcome(cause)] * len(task.keys), now, now))

    def _wait(self, timeout_s: float) -> None:
        """Wait until a process says something, or for a short time where none will."""
        poll = select.poll()
        for group in self._groups:
            for running in group.running():
                if running.process.fd >= 0:
                    poll.register(running.process.fd, select.POLLIN)
        undead = any(group.given_up for group in self._groups)
        poll.poll(1000 * min(timeout_s, 0.002 if undead else 0.05))
        self._check_at = 0.0
