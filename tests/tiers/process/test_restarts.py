"""How often I/O processes that are of no use are started, on a clock of the test's own."""

import itertools
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from kvstrata.tiers.process import process as process_module
from kvstrata.tiers.process import supervisor as processes_module
from kvstrata.tiers.process.failures import Failures
from kvstrata.tiers.process.medium import MediumSpec, Outcome
from kvstrata.tiers.process.messages import Done, Kind, Setup, Task, pack, packet, unpack_tasks
from kvstrata.tiers.process.supervisor import IoProcesses
from kvstrata.tiers.process.tier import ProcessTier
from kvstrata.tiers.testing import CONTEXT, make_key

STEP_S = 0.25
TASK = Task(Kind.CHECK, [make_key(1)])


class World:
    """The clock, and when processes were started; they die at once, or end their first task."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.starts: list[float] = []
        self.lives = False

    def monotonic(self) -> float:
        return self.now

    def start(self, setup: Setup) -> SimpleNamespace:
        if setup.readers:
            self.starts.append(self.now)
        packets: list[bytes] = []

        def send(raw: bytes) -> bool:
            (task,) = unpack_tasks(raw)
            packets.append(packet([pack(Done(task.task_id, [Outcome()], self.now, self.now))]))
            return True

        return SimpleNamespace(
            pid=1,
            fd=7 if self.lives else -1,
            broken=False,
            has_word=True,
            kill=lambda: None,
            exit_status=lambda: "exit status 3",
            send=send if self.lives else lambda raw: False,
            receive=lambda: packets.pop(0) if packets else None,
        )

    def run(self, processes: IoProcesses, seconds: float) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for _ in range(int(seconds / STEP_S)):
            processes.look()
            outcomes += [o for ended in processes.take_ended() for o in ended.outcomes]
            self.now += STEP_S
        return outcomes


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(processes_module, "time", world)
    monkeypatch.setattr(processes_module, "IoProcess", world.start)
    return world


@pytest.fixture
def processes(world: World) -> IoProcesses:
    assert CONTEXT.region is not None
    setup = Setup(MediumSpec("none:None", None), CONTEXT, CONTEXT.region, 1, True)
    return IoProcesses(setup, 1, 1, Failures("test"))


def test_useless_processes_are_started_ever_more_seldom(
    world: World, processes: IoProcesses
) -> None:
    world.run(processes, 300.0)
    pauses = [later - start for start, later in itertools.pairwise(world.starts)]
    expected = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    assert len(pauses) == len(expected)
    assert all(0 <= found - s <= 2 * STEP_S for found, s in zip(pauses, expected, strict=True))


def test_after_a_useful_process_it_begins_anew(world: World, processes: IoProcesses) -> None:
    world.run(processes, 100.0)
    world.lives = True
    world.run(processes, 61.0)
    processes.submit([TASK])
    assert world.run(processes, 1.0) == [Outcome()]
    world.lives = False
    for group in processes._groups:
        assert group.current is not None
        group.current.process.fd = -1
    world.starts.clear()
    world.run(processes, 4.0)
    assert len(world.starts) >= 3


def test_tasks_do_not_wait_long_for_a_process(world: World, processes: IoProcesses) -> None:
    world.run(processes, 100.0)
    processes.submit([TASK])
    assert world.run(processes, 2 * STEP_S) == [Outcome("crashed")]


def test_the_start_does_not_wait_for_what_will_not_start(
    open_tier: Callable[..., ProcessTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    (processes,) = open_tier().processes
    assert processes.restarts == 0
    assert not processes.wait_ready(20.0) and processes.restarts == 0
