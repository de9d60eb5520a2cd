"""The modelled disk: jobs in order, and what leaves first, and when, is the fs tier's own."""

from collections.abc import Sequence

from kvstrata.offload.simulate.clock import Clock
from kvstrata.offload.simulate.disk import ModelledDisk
from kvstrata.tiers.base import Job, Lookup, RequestView
from kvstrata.tiers.fs.budget.limits import HIGH, file_cost

PAGE = 1 << 20
COST = file_cost(PAGE + 4096)
VIEW = RequestView("r")


def key(number: int) -> bytes:
    return number.to_bytes(8, "big") + bytes(4)


class Disk(ModelledDisk):
    """100 pages/s each way, a tenth of a second of latency."""

    def __init__(self, pages: int | None = None) -> None:
        self.clock = Clock()
        self.jobs = 0
        rate = 100.0 * PAGE
        most = 0 if pages is None else pages * COST
        super().__init__(most, PAGE, read=rate, write=rate, latency_s=0.1, clock=self.clock)

    def job(self, numbers: Sequence[int], request: RequestView = VIEW) -> Job:
        self.jobs += 1
        keys = [key(number) for number in numbers]
        ends = [512 * (at + 1) for at in range(len(keys))]
        return Job(
            self.jobs, keys, range(len(keys)), ends, request, lambda key, slot: memoryview(b"")
        )

    def store(self, numbers: Sequence[int], request: RequestView = VIEW) -> None:
        """For good."""
        self.submit_store(self.job(numbers, request))
        self.clock.reach(self.next_end)
        assert [result.failed for result in self.get_finished()] == [{}]

    def has(self, number: int) -> bool:
        return self.lookup(key(number), VIEW) is Lookup.HIT


def test_jobs_of_one_direction_wait_for_each_other() -> None:
    disk = Disk()
    disk.submit_store(disk.job(range(50)))
    disk.submit_store(disk.job(range(50, 60)))
    assert disk.next_end == 0.6
    disk.clock.reach(0.59)
    assert disk.get_finished() == [] and not disk.has(0)
    disk.clock.reach(0.6)
    assert [result.job_id for result in disk.get_finished()] == [1]
    assert disk.has(49) and not disk.has(50)
    disk.submit_load(disk.job(range(10)))  # does not wait for the stores
    disk.clock.reach(0.9)
    first, second = disk.get_finished()
    assert (first.job_id, second.job_id) == (2, 3)
    assert second.nbytes == 10 * PAGE
    assert (disk.written, disk.read_bytes) == (60 * PAGE, 10 * PAGE)


def test_what_is_there_is_not_written_again() -> None:
    disk = Disk()
    disk.store(range(4))
    disk.submit_store(disk.job(range(2, 6)))
    disk.submit_store(disk.job(range(4, 6)))  # is being written
    disk.clock.reach(1.0)
    assert [result.nbytes for result in disk.get_finished()] == [2 * PAGE, 0]
    assert disk.written == 6 * PAGE and len(disk) == 6


def test_the_least_recently_used_leaves_first_and_of_one_request_the_end() -> None:
    disk = Disk(100)
    one, two = RequestView("one"), RequestView("two")
    for view, numbers in ((one, range(40)), (two, range(40, 80))):
        disk.on_new_request(view)
        disk.store(numbers, view)
        disk.on_request_finished(view)
    disk.touch([key(number) for number in range(20)], one)
    disk.store(range(200, 220), RequestView("three"))
    gone = [number for number in range(80) if not disk.has(number)]
    assert gone == list(range(40 - len(gone), 40))
    assert disk.evicted == len(gone) > 0


def test_the_budget_is_kept_below_the_high_mark() -> None:
    disk = Disk(100)
    disk.store(range(300))
    assert 90 < len(disk) <= 100 * HIGH
    assert disk.written == 300 * PAGE and disk.evicted == 300 - len(disk)


def test_a_page_that_is_to_be_loaded_stays() -> None:
    disk = Disk(100)
    disk.store(range(90))
    disk.submit_load(disk.job(range(5)))
    disk.submit_store(disk.job(range(100, 300)))
    disk.clock.reach(disk.next_end)
    assert all(disk.has(number) for number in range(5))


def test_what_left_before_it_was_to_be_loaded_is_missing() -> None:
    disk = Disk(100)
    disk.submit_load(disk.job([1]))
    disk.clock.reach(1.0)
    (result,) = disk.get_finished()
    assert result.failed == {key(1): "missing"} and result.nbytes == 0
