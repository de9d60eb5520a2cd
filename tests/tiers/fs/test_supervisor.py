"""I/O processes that die, hang, cannot be started, and leave nothing behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvstrata.tiers.base import JobResult, Lookup, TierConfigError, TierContext
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.fs.tools.scan import check_root
from kvstrata.tiers.process import process as process_module
from kvstrata.tiers.process import supervisor as processes_module
from kvstrata.tiers.testing import (
    CONTEXT,
    REQUEST,
    Slots,
    finish,
    load,
    make_data,
    make_job,
    make_key,
    settle,
    store,
)
from tests.waiting import wait_until

OpenTier = Callable[..., FsTier]
SIZE = CONTEXT.layouts[2].nbytes
KEYS = [make_key(n, group=2) for n in range(400)]
DATA = {key: make_data(n, SIZE) for n, key in enumerate(KEYS)}
KEY = KEYS[0]


def state(pid: int) -> str:
    """The process's state, "Z" for a zombie; "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def gone(*pids: int) -> bool:
    """Whether the processes have ended; whose child they are, and who collects them, is open."""
    return all(state(pid) in ("", "Z") for pid in pids)


def children() -> list[int]:
    path = f"/proc/{os.getpid()}/task/{os.getpid()}/children"
    return [int(pid) for pid in Path(path).read_text().split()]


def fill(slots: Slots) -> None:
    for index, data in enumerate(DATA.values()):
        slots.view(index)[:] = data


def started(tier: FsTier) -> tuple[int, ...]:
    """Readers and writers, once both have started."""

    def both() -> bool:
        assert not tier.get_finished()
        return all(g.current is not None and g.current.ready for g in tier.processes[0]._groups)

    wait_until(both)
    return tier.processes[0].pids()


def kill(tier: FsTier, chosen: list[int]) -> None:
    """Kill the readers (0) or the writers (1), or both, once there are both."""
    while len(tier.processes[0].pids()) < 2:
        tier.drain(0.0)
    for index in chosen:
        os.kill(tier.processes[0].pids()[index], signal.SIGKILL)


@pytest.mark.parametrize("victim", ["readers", "writers", "both"])
def test_killed_in_the_middle_of_a_burst(
    open_tier: OpenTier, root: Path, victim: str, is_long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes_module, "RESTART_S", 0.01)
    attempts = 20 if is_long else 3
    tier = open_tier()
    slots, lost = Slots.make(len(KEYS), SIZE), 0
    chosen = {"readers": [0], "writers": [1], "both": [0, 1]}[victim]
    for attempt in range(attempts):
        fill(slots)
        tier.submit_store(make_job(attempt, KEYS, slots, CONTEXT))
        time.sleep(0.008 * (attempt % 3))
        kill(tier, chosen)
        (result,) = finish(tier)
        assert set(result.failed.values()) <= {"crashed"}
        lost += len(result.failed)
        assert check_root(str(root)).bad == []
        back = Slots.make(len(KEYS), SIZE)
        tier.submit_load(make_job(100 + attempt, KEYS, back, CONTEXT))
        time.sleep(0.004 * (attempt % 3))
        kill(tier, chosen)
        (result,) = finish(tier)
        assert set(result.failed.values()) <= {"crashed", "missing"}
        lost += len(result.failed)
        arrived = {k: bytes(back.view(i)) for i, k in enumerate(KEYS) if k not in result.failed}
        assert all(arrived[key] == DATA[key] for key in arrived)
        back.check_guards()
        for key in KEYS:
            Path(tier.paths[0].page(key)).unlink(missing_ok=True)
    assert lost > 0, "no process was killed while it worked: the test saw nothing"
    stats = tier.stats()
    assert stats.failures["crashed"] > 0
    assert stats.counters["restarted_processes"] >= attempts * len(chosen)
    assert not store(tier, DATA).failed  # the new ones serve
    assert load(tier, KEYS)[1] == DATA


def test_a_crash_while_nothing_runs(open_tier: OpenTier) -> None:
    tier = open_tier()
    store(tier, {KEY: DATA[KEY]})
    old = tier.processes[0].pids()
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    assert load(tier, [KEY])[0].failed in ({}, {KEY: "crashed"})
    wait_until(lambda: not set(old) & set(started(tier)))
    assert load(tier, [KEY])[1] == {KEY: DATA[KEY]}


def test_a_stopped_process_is_replaced(
    open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(processes_module, "STALL_S", 1.0)
    tier = open_tier()
    store(tier, {KEY: DATA[KEY]})
    readers, writers = started(tier)
    os.kill(readers, signal.SIGSTOP)
    wait_until(lambda: state(readers) == "T")
    start = time.monotonic()
    result, _ = load(tier, [KEY])
    assert result.failed == {KEY: "stalled"}
    assert time.monotonic() - start >= 1.0
    wait_until(lambda: gone(readers))
    assert load(tier, [KEY])[1] == {KEY: DATA[KEY]}
    assert settle(tier, KEY) is Lookup.HIT
    assert started(tier)[1] == writers, "who works is left alone"
    assert tier.stats().failures == {"stalled": 1}
    assert len([r for r in caplog.records if "stalled" in r.message]) == 1


def test_one_thread_that_hangs_while_others_work(
    open_tier: OpenTier, faults: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that hangs, for example on a network mount, must not keep its job for ever."""
    monkeypatch.setattr(processes_module, "STALL_S", 1.0)
    tier = open_tier(n_read_threads=2)
    store(tier, DATA)
    faults.set(preadv="hang")
    slots = Slots.make(1, SIZE)
    tier.submit_load(make_job(50, [KEY], slots, CONTEXT))
    time.sleep(0.1)  # one thread has it by now
    faults.set(preadv="hang-no-more")
    assert not finish(tier)[0].failed
    faults.set(rename="hang")
    key = make_key(1000, group=2)
    tier.submit_store(make_job(51, [key], slots, CONTEXT))
    results: list[JobResult] = []
    deadline = time.monotonic() + 60.0
    while not results:  # checks that end keep the process from looking dead
        assert time.monotonic() < deadline
        tier.lookup(make_key(int(time.monotonic_ns()), group=2), REQUEST)
        tier.on_step_end()
        results.extend(tier.get_finished())
        time.sleep(0.001)
    assert results[0].failed == {key: "stalled"}


def test_shutdown_kills_what_hangs(open_tier: OpenTier, faults: Any) -> None:
    tier = open_tier()
    pids = started(tier)
    faults.set(pwritev="hang")
    slots = Slots.make(1, SIZE)
    tier.submit_store(make_job(1, [KEY], slots, CONTEXT))
    assert not tier.drain(0.05)
    os.kill(pids[0], signal.SIGSTOP)
    assert tier.shutdown(1.0)
    wait_until(lambda: gone(*pids))
    assert tier.get_finished()[0].failed == {KEY: "shutdown"}


class Undead:
    """Makes the kernel fail to end processes, as it does for those in a dead mount."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.spared: set[int] = set()
        kill = process_module.IoProcess.kill

        def refuse(process: process_module.IoProcess) -> None:
            if process.pid not in self.spared:
                kill(process)

        monkeypatch.setattr(process_module.IoProcess, "kill", refuse)


def test_pages_of_a_process_that_cannot_be_killed_stay_open(
    open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes_module, "STALL_S", 1.0)
    undead = Undead(monkeypatch)
    tier = open_tier()
    store(tier, {KEY: DATA[KEY]})
    old = started(tier)[0]
    undead.spared.add(old)
    os.kill(old, signal.SIGSTOP)
    slots = Slots.make(1, SIZE)
    tier.submit_load(make_job(7, [KEY], slots, CONTEXT))
    wait_until(lambda: not tier.get_finished() and tier.processes[0].pids()[0] != old)
    assert load(tier, [KEY])[1] == {KEY: DATA[KEY]}, "the new one serves"
    assert not tier.drain(0.05)
    assert not tier.shutdown(0.2)
    assert not tier.get_finished(), "the old one may still write into the page"
    os.kill(old, signal.SIGCONT)
    (result,) = finish(tier)  # and so it did: what it says is believed
    assert result.job_id == 7 and not result.failed and bytes(slots.view(0)) == DATA[KEY]
    undead.spared.clear()
    os.kill(old, signal.SIGKILL)
    assert tier.shutdown(60.0)
    wait_until(lambda: gone(old))


def test_a_dead_file_system_does_not_pile_up_processes(
    open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes_module, "STALL_S", 0.5)
    monkeypatch.setattr(processes_module, "RESTART_S", 0.0)
    undead = Undead(monkeypatch)
    tier = open_tier()
    store(tier, {KEY: DATA[KEY]})
    slots, stopped = Slots.make(1, SIZE), []
    for job_id in range(processes_module.MOST_UNDEAD):
        pid = started(tier)[0]
        undead.spared.add(pid)
        stopped.append(pid)
        os.kill(pid, signal.SIGSTOP)
        tier.submit_load(make_job(job_id, [KEY], slots, CONTEXT))
        wait_until(lambda pid=pid: not tier.get_finished() and pid not in tier.processes[0].pids())
    assert len(tier.processes[0].pids()) == 1
    writers = tier.processes[0].pids()[0]
    undead.spared.add(writers)
    os.kill(writers, signal.SIGSTOP)  # they helped
    stopped.append(writers)
    tier.submit_load(make_job(10, [KEY], slots, CONTEXT))
    wait_until(lambda: not tier.get_finished() and writers not in tier.processes[0].pids())
    for pid in stopped:  # the mount came back
        undead.spared.clear()
        os.kill(pid, signal.SIGKILL)
    results = finish(tier, len(stopped))
    assert {cause for r in results for cause in r.failed.values()} == {"stalled"}
    assert load(tier, [KEY])[1] == {KEY: DATA[KEY]}


def test_a_process_that_cannot_start(open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "COMMAND", ("/does/not/exist",))
    with pytest.raises(TierConfigError, match="no I/O process can be started"):
        open_tier()


def test_processes_that_die_at_once(open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = open_tier()
    store(tier, {KEY: DATA[KEY]})
    monkeypatch.setattr(processes_module, "RESTART_S", 0.05)
    with monkeypatch.context() as patch:
        patch.setattr(process_module, "COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
        for pid in tier.processes[0].pids():
            os.kill(pid, signal.SIGKILL)
        causes = [load(tier, [KEY])[0].failed[KEY] for _ in range(4)]
        assert causes == ["crashed"] * 4
        patch.setattr(process_module, "COMMAND", ("/does/not/exist",))
        wait_until(lambda: not tier.get_finished() and "no-process" in tier.stats().failures)
    wait_until(lambda: not load(tier, [KEY])[0].failed)


def test_a_context_without_a_region(root: Path) -> None:
    context = TierContext(CONTEXT.model, CONTEXT.namespace, CONTEXT.layouts)
    with pytest.raises(TierConfigError, match="not in shared memory"):
        FsTier({"root_dir": str(root)}, context)


def resources(pids: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Open descriptors and private memory (KiB) of this process and of the given ones."""
    descriptors, memory = [], []
    for pid in (os.getpid(), *pids):
        descriptors.append(len(os.listdir(f"/proc/{pid}/fd")))
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        memory.append(next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")))
    return descriptors, memory


def test_nothing_grows(open_tier: OpenTier, is_long: bool) -> None:
    tier = open_tier()
    slots = Slots.make(8, SIZE)

    def work(jobs: int) -> None:
        for number in range(jobs):
            keys = [make_key(n % 64, group=2) for n in range(number, number + 8)]
            tier.submit_store(make_job(2 * number, keys, slots, CONTEXT))
            tier.submit_load(make_job(2 * number + 1, keys, slots, CONTEXT))
            finish(tier, 2)

    work(50)
    before = resources(tier.processes[0].pids())
    work(2000 if is_long else 100)
    # whoever keeps the books opens a file at any time, and closes it again
    pids = tier.processes[0].pids()
    wait_until(lambda: all(a <= b for a, b in zip(resources(pids)[0], before[0], strict=True)))
    after = resources(pids)
    assert all(a - b < 4096 for a, b in zip(after[1], before[1], strict=True)), (before, after)


def test_nothing_is_left(open_tier: OpenTier) -> None:
    before = len(os.listdir("/proc/self/fd"))
    old = set(children())
    for _ in range(3):
        tier = open_tier()
        store(tier, {KEY: DATA[KEY]})
        os.kill(tier.processes[0].pids()[0], signal.SIGKILL)
        load(tier, [KEY])
        assert tier.shutdown(60.0)
        assert len(os.listdir("/proc/self/fd")) == before
        assert set(children()) <= old, "no zombies"


def test_others_inherit_nothing(open_tier: OpenTier) -> None:
    tier = open_tier()
    store(tier, {KEY: DATA[KEY]})
    script = (
        "import os, json; print(json.dumps([os.readlink(f'/proc/self/fd/{n}') "
        "for n in os.listdir('/proc/self/fd') if os.path.lexists(f'/proc/self/fd/{n}')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], close_fds=False, capture_output=True, check=True
    )
    opened = json.loads(done.stdout)
    assert not [name for name in opened if "memfd" in name or "socket" in name]
    for pid in tier.processes[0].pids():
        names = [os.readlink(f"/proc/{pid}/fd/{n}") for n in os.listdir(f"/proc/{pid}/fd")]
        assert len([name for name in names if name.startswith("socket")]) == 1


def test_the_processes_share_the_processor_with_the_engine_but_not_its_signals(
    open_tier: OpenTier,
) -> None:
    for pid in started(open_tier()):
        assert os.getsid(pid) == os.getsid(0)
        assert os.getpgid(pid) != os.getpgid(0)


ENGINE = """
import os, sys, time
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.testing import CONTEXT, load, make_data, make_key, store
tier = FsTier({"root_dir": sys.argv[1], "min_free_bytes": 0}, CONTEXT)
store(tier, {make_key(1): make_data(1, CONTEXT.layouts[0].nbytes)})
assert not load(tier, [make_key(1)])[0].failed  # both processes have started
if "{fork}" and os.fork() == 0:
    time.sleep(60)  # keeps the engine's ends of the sockets open
    os._exit(0)
print(*tier.processes[0].pids(), flush=True)
{end}
"""


@pytest.mark.parametrize("fork", ["", "fork"])
@pytest.mark.parametrize("end", ["time.sleep(60)", "sys.exit()", "os._exit(1)"])
def test_no_process_outlives_the_engine_for_long(root: Path, end: str, fork: str) -> None:
    script = ENGINE.replace("{end}", end).replace("{fork}", fork)
    command = [sys.executable, "-c", script, str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as engine:
        assert engine.stdout is not None
        pids = [int(word) for word in engine.stdout.readline().split()]
        assert len(pids) == 2
        if "sleep" in end:
            assert all(state(pid) for pid in pids)
            if not fork:
                os.kill(pids[0], signal.SIGSTOP)
            engine.kill()
        engine.wait(60.0)
        wait_until(lambda: gone(*pids))
        if fork:
            os.killpg(engine.pid, signal.SIGKILL)  # the forked copy
