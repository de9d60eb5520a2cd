"""How far the workers are: ranges of slots, and the counters that say so."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.offload.primary.progress import LEAST_SLOTS, RANGE_BYTES, Progress

MIB = 2**20


def make(slots: int, slot_bytes: int, workers: int) -> Progress:
    return Progress(np.zeros((workers, 4), np.int64), slots, slot_bytes)


@given(st.integers(1, 8), st.integers(0, 5000), st.sampled_from([4096, MIB, 64 * MIB]))
def test_each_slot_is_in_one_range(workers: int, more: int, slot_bytes: int) -> None:
    slots = workers + more
    progress = make(slots, slot_bytes, workers)
    ranges = [progress.slots_of(index) for index in range(progress.ranges)]
    assert [slot for some in ranges for slot in some] == list(range(slots))
    assert all(ranges), "each worker has a slot to try its copies on"
    assert progress.first_slots == sum(map(len, ranges[:workers]))
    longest = max(map(len, ranges))
    alike = workers == len(ranges)
    assert alike or longest * slot_bytes <= RANGE_BYTES + slot_bytes or longest <= 2 * LEAST_SLOTS
    assert alike or min(map(len, ranges)) >= LEAST_SLOTS


def test_large_tiers_have_many_ranges_and_small_ones_one_of_each_worker() -> None:
    assert make(2**40 // (2 * MIB), 2 * MIB, 8).ranges == 4096
    assert make(64, MIB, 4).ranges == 4


def test_a_range_is_reserved_when_its_worker_has_come_so_far() -> None:
    progress = make(64 * 16, 16 * MIB, 2)
    progress.set_reserved(1, 2)
    assert [progress.reserved(index) for index in range(6)] == [False, True, False, True] + [
        False
    ] * 2


def test_slots_can_be_used_when_all_workers_can() -> None:
    progress = make(64 * 16, 16 * MIB, 2)
    assert progress.usable() == 0
    progress.set_usable(0, 5)
    assert progress.usable() == 0
    progress.set_usable(1, 3)
    assert progress.usable() == progress.slots_of(3).start == 48
    for rank in range(2):
        progress.set_usable(rank, progress.ranges)
    assert progress.usable() == 1024 and progress.complete


def test_what_a_worker_leaves_out_is_left_out_by_all() -> None:
    progress = make(64 * 16, 16 * MIB, 2)
    assert progress.limit == progress.ranges == 64
    progress.leave_out(1, 40)
    progress.leave_out(0, 50)
    progress.leave_out(1, 45)  # another thread, later
    assert progress.limit == 40
    progress.set_usable(0, 40)
    assert not progress.complete
    progress.set_usable(1, 40)
    assert progress.complete and progress.usable() == 640
