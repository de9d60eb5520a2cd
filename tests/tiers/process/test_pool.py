import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from kvstrata.tiers.process.pool import Pool


@dataclass
class Work:
    """Notes its name when it runs or is dropped."""

    name: str
    log: list[str]
    action: Callable[[], object] = field(default=lambda: None)

    def run(self) -> None:
        self.action()
        self.log.append(self.name)

    def drop(self) -> None:
        self.log.append(f"dropped {self.name}")


def works(kind: str, count: int, log: list[str]) -> list[Work]:
    return [Work(f"{kind}{index}", log) for index in range(count)]


def blocked_pool(threads: int, reads_first: bool = True) -> tuple[Pool, threading.Event]:
    """A pool all of whose threads wait for the event."""
    pool, gate = Pool(threads, reads_first), threading.Event()
    busy = threading.Barrier(threads + 1)

    def block() -> None:
        busy.wait(60.0)
        gate.wait(60.0)

    pool.submit([Work("block", [], block) for _ in range(threads)], writes=False)
    busy.wait(60.0)
    return pool, gate


@pytest.mark.parametrize(("reads_first", "order"), [(True, "rw"), (False, "wr")])
def test_what_it_prefers_goes_first_and_then_it_helps(reads_first: bool, order: str) -> None:
    pool, gate = blocked_pool(1, reads_first)
    log: list[str] = []
    pool.submit(works("w", 3, log), writes=True)
    pool.submit(works("r", 3, log), writes=False)
    gate.set()
    assert pool.wait_idle(60.0)
    assert log == [f"{kind}{i}" for kind in order for i in range(3)]
    assert pool.close(60.0)


def test_closing_may_end_the_writes() -> None:
    pool, gate = blocked_pool(3)
    log: list[str] = []
    pool.submit(works("w", 5, log), writes=True)
    pool.submit(works("r", 3, log), writes=False)
    assert not pool.close(0.0, end_writes=True)
    pool.submit([Work("late", log)], writes=True)
    assert log == ["dropped r0", "dropped r1", "dropped r2", "dropped late"]
    gate.set()
    assert pool.wait_idle(60.0)
    assert sorted(log[4:]) == [f"w{i}" for i in range(5)]


def test_closing_drops_what_waits_and_waits_for_what_runs() -> None:
    pool, gate = blocked_pool(2)
    log: list[str] = []
    pool.submit([Work("a", log)], writes=True)
    pool.submit([Work("b", log)], writes=False)
    assert not pool.wait_idle(0.0)
    assert not pool.close(0.0)
    assert sorted(log) == ["dropped a", "dropped b"]
    gate.set()
    assert pool.close(60.0)
    pool.submit([Work("c", log)], writes=False)
    assert log[-1] == "dropped c"


def test_the_threads_end() -> None:
    before = threading.active_count()
    pool = Pool(6, True)
    assert threading.active_count() == before + 6
    assert pool.close(60.0)
    for thread in threading.enumerate():
        if thread.name.startswith("kvstrata-io-"):
            thread.join(60.0)
    assert threading.active_count() <= before


def test_a_task_that_raises_does_not_cost_a_thread() -> None:
    pool = Pool(1, True)
    log: list[str] = []
    pool.submit([Work("bad", log, lambda: 1 / 0), Work("good", log)], writes=False)
    assert pool.wait_idle(60.0)
    assert log == ["good"]
    assert pool.close(60.0)
