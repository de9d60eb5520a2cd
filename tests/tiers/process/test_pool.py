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


def submit(pool: Pool[Work], kind: str, count: int, log: list[str]) -> None:
    for index in range(count):
        pool.submit(Work(f"{kind}{index}", log), writes=kind == "w")


def blocked_pool(threads: int, reads_first: bool = True) -> tuple[Pool[Work], threading.Event]:
    """A pool all of whose threads wait for the event."""
    pool, gate = Pool(threads, reads_first, Work.run, Work.drop), threading.Event()
    busy = threading.Barrier(threads + 1)

    def block() -> None:
        busy.wait(60.0)
        gate.wait(60.0)

    for _ in range(threads):
        pool.submit(Work("block", [], block), writes=False)
    busy.wait(60.0)
    return pool, gate


@pytest.mark.parametrize(("reads_first", "order"), [(True, "rw"), (False, "wr")])
def test_what_it_prefers_goes_first_and_then_it_helps(reads_first: bool, order: str) -> None:
    pool, gate = blocked_pool(1, reads_first)
    log: list[str] = []
    submit(pool, "w", 3, log)
    submit(pool, "r", 3, log)
    gate.set()
    assert pool.wait_idle(60.0)
    assert log == [f"{kind}{i}" for kind in order for i in range(3)]
    pool.close(end_writes=False)


def test_closing_may_end_the_writes() -> None:
    pool, gate = blocked_pool(3)
    log: list[str] = []
    submit(pool, "w", 5, log)
    submit(pool, "r", 3, log)
    pool.close(end_writes=True)
    assert not pool.wait_idle(0.0)
    assert log == ["dropped r0", "dropped r1", "dropped r2"]
    gate.set()
    assert pool.wait_idle(60.0)
    assert sorted(log[3:]) == [f"w{i}" for i in range(5)]


def test_closing_drops_what_waits_and_waits_for_what_runs() -> None:
    pool, gate = blocked_pool(2)
    log: list[str] = []
    pool.submit(Work("a", log), writes=True)
    pool.submit(Work("b", log), writes=False)
    assert not pool.wait_idle(0.0)
    pool.close(end_writes=False)
    assert not pool.wait_idle(0.0)
    assert sorted(log) == ["dropped a", "dropped b"]
    gate.set()
    assert pool.wait_idle()
    assert len(log) == 2


def test_the_threads_end() -> None:
    before = threading.active_count()
    pool = Pool(6, True, Work.run, Work.drop)
    assert threading.active_count() == before + 6
    pool.close(end_writes=False)
    for thread in threading.enumerate():
        if thread.name.startswith("kvstrata-io-"):
            thread.join(60.0)
    assert threading.active_count() <= before


def test_a_task_that_raises_does_not_cost_a_thread() -> None:
    pool = Pool(1, True, Work.run, Work.drop)
    log: list[str] = []
    pool.submit(Work("bad", log, lambda: 1 / 0), writes=False)
    pool.submit(Work("good", log), writes=False)
    assert pool.wait_idle(60.0)
    assert log == ["good"]
    pool.close(end_writes=False)


@pytest.mark.parametrize(("reads_first", "first", "second"), [(True, "r", "w"), (False, "w", "r")])
def test_what_it_does_not_prefer_comes_to_its_turn(
    reads_first: bool, first: str, second: str
) -> None:
    pool, gate = blocked_pool(1, reads_first)
    log: list[str] = []
    submit(pool, first, 20, log)
    submit(pool, second, 2, log)
    gate.set()
    assert pool.wait_idle(60.0)
    assert [log.index(f"{second}{index}") for index in range(2)] == [8, 17]
    pool.close(end_writes=False)
