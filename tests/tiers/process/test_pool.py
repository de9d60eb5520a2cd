import threading
from collections.abc import Callable
from dataclasses import dataclass, field

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


def blocked_pool(n_read: int, n_write: int) -> tuple[Pool, threading.Event]:
    """A pool all of whose threads wait for the event."""
    pool, gate = Pool(n_read, n_write), threading.Event()
    busy = threading.Barrier(n_read + n_write + 1)

    def block() -> None:
        busy.wait(60.0)
        gate.wait(60.0)

    pool.submit_reads(Work("block", [], block) for _ in range(n_read + n_write))
    busy.wait(60.0)
    return pool, gate


def test_each_group_prefers_its_own_queue_and_helps_the_other() -> None:
    for n_read, n_write, first in ((1, 0, "r"), (0, 1, "w")):
        pool, gate = blocked_pool(n_read, n_write)
        log: list[str] = []
        pool.submit_writes(Work(f"w{i}", log) for i in range(3))
        pool.submit_reads(Work(f"r{i}", log) for i in range(3))
        assert pool.queued() == (3, 3)
        gate.set()
        assert pool.wait_idle(60.0)
        other = "w" if first == "r" else "r"
        assert log == [f"{kind}{i}" for kind in (first, other) for i in range(3)]
        assert pool.close(60.0)


def test_closing_may_end_the_writes() -> None:
    pool, gate = blocked_pool(2, 1)
    log: list[str] = []
    pool.submit_writes(Work(f"w{i}", log) for i in range(5))
    pool.submit_reads(Work(f"r{i}", log) for i in range(3))
    assert not pool.close(0.0, end_writes=True)
    pool.submit_writes([Work("late", log)])
    assert log == ["dropped r0", "dropped r1", "dropped r2", "dropped late"]
    gate.set()
    assert pool.wait_idle(60.0)
    assert sorted(log[4:]) == [f"w{i}" for i in range(5)]


def test_closing_drops_what_waits_and_waits_for_what_runs() -> None:
    pool, gate = blocked_pool(1, 1)
    log: list[str] = []
    pool.submit_writes([Work("a", log)])
    pool.submit_reads([Work("b", log)])
    assert not pool.wait_idle(0.0)
    assert not pool.close(0.0)
    assert sorted(log) == ["dropped a", "dropped b"]
    gate.set()
    assert pool.close(60.0)
    pool.submit_reads([Work("c", log)])
    assert log[-1] == "dropped c"


def test_the_threads_end() -> None:
    before = threading.active_count()
    pool = Pool(3, 3)
    assert threading.active_count() == before + 6
    assert pool.close(60.0)
    for thread in threading.enumerate():
        if thread.name.startswith("kvstrata-fs-") and thread.name != "kvstrata-fs-sweep":
            thread.join(60.0)
    assert threading.active_count() <= before


def test_a_task_that_raises_does_not_cost_a_thread() -> None:
    pool = Pool(1, 0)
    log: list[str] = []
    pool.submit_reads([Work("bad", log, lambda: 1 / 0), Work("good", log)])
    assert pool.wait_idle(60.0)
    assert log == ["good"]
    assert pool.close(60.0)
