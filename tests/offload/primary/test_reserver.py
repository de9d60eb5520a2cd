"""Workers that reserve the region together: order, shortage, refusal, shutdown."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata.offload.primary import progress as progress_module
from kvstrata.offload.primary import reserver as reserver_module
from kvstrata.offload.primary.region import Region, RegionError, create_region, open_region
from kvstrata.offload.primary.reserver import Reserver
from tests.waiting import PATIENCE_S, wait_until

SLOTS, SLOT_BYTES = 24, 4096


class Workers:
    """Two workers on one region of twelve ranges, and what they did."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fields = {"slots": SLOTS, "slot_bytes": SLOT_BYTES, "workers": 2}
        created = create_region("e", fields, directory=folder)
        self.regions = [created, open_region("e", folder)]
        self.progress = open_region("e", folder).progress  # the scheduler's
        self.reservers = [Reserver(region, rank) for rank, region in enumerate(self.regions)]
        self.reserved: list[range] = []
        self.pinned: list[list[range]] = [[], []]
        self.short: range | None = None  # there is no memory for these
        self.refused: range | None = None  # worker 1 cannot pin these
        self.gate: threading.Event | None = None  # reserving waits for it
        self.waiting = 0
        monkeypatch.setattr(Region, "reserve", self.reserve)

    def reserve(self, slots: range) -> None:
        if self.gate is not None:
            self.waiting += 1
            assert self.gate.wait(PATIENCE_S)
        if slots == self.short:
            raise RegionError("too little is free: lower cpu_bytes_to_use")
        self.reserved.append(slots)

    def pin(self, rank: int, slots: range) -> None:
        assert slots in self.reserved and self.progress.serving
        if rank == 1 and slots == self.refused:
            raise RuntimeError("could not pin: use a smaller cpu_bytes_to_use")
        self.pinned[rank].append(slots)

    def start(self) -> None:
        for reserver in self.reservers:
            reserver.reserve_first()
        self.reservers[0].start(lambda slots: self.pin(0, slots))
        self.reservers[1].start(lambda slots: self.pin(1, slots))

    def stop(self) -> None:
        for reserver in self.reservers:
            reserver.stop()


@pytest.fixture
def workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Iterator[Workers]:
    monkeypatch.setattr(progress_module, "RANGE_BYTES", 2 * SLOT_BYTES)
    monkeypatch.setattr(progress_module, "LEAST_SLOTS", 1)
    caplog.set_level(logging.INFO, logger="kvstrata")
    made = Workers(tmp_path, monkeypatch)
    yield made
    if made.gate is not None:
        made.gate.set()
    made.stop()


def test_all_slots_become_usable(workers: Workers, caplog: pytest.LogCaptureFixture) -> None:
    progress = workers.progress
    workers.start()
    assert progress.usable() == 4
    wait_until(lambda: progress.reserved(11))  # before the scheduler is there
    assert workers.pinned == [[], []]
    progress.serve()
    wait_until(lambda: progress.usable() == SLOTS)
    wait_until(lambda: "24 of 24 slots of the CPU tier can be used" in caplog.text)
    ranges = [progress.slots_of(index) for index in range(12)]
    assert sorted(workers.reserved, key=lambda some: some.start) == ranges
    assert workers.pinned == [ranges[2:]] * 2, "the first round is the pipeline's"
    assert "4 of 24 slots of the CPU tier are reserved after" in caplog.text
    assert len(caplog.records) == 2


def test_several_threads_end_in_any_order(
    tmp_path: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A range counts when all of the worker's before it have memory."""
    monkeypatch.setattr(reserver_module.os, "sched_getaffinity", lambda pid: range(64))
    for reserver in workers.reservers:
        reserver.reserve_first()
    workers.gate = threading.Event()
    held = threading.Event()
    late = workers.progress.slots_of(2)
    reserve = workers.reserve

    def slow(slots: range) -> None:
        if slots == late:
            assert held.wait(PATIENCE_S)
        reserve(slots)

    workers.gate.set()
    monkeypatch.setattr(Region, "reserve", staticmethod(slow))
    workers.reservers[0].start(lambda slots: None)
    others = [workers.progress.slots_of(index) for index in range(4, 12, 2)]
    wait_until(lambda: all(slots in workers.reserved for slots in others))
    assert not any(workers.progress.reserved(index) for index in range(2, 12, 2))
    held.set()
    wait_until(lambda: workers.progress.reserved(10))


def test_a_shortage_leaves_the_rest_out(workers: Workers, caplog: pytest.LogCaptureFixture) -> None:
    workers.short = workers.progress.slots_of(7)
    workers.progress.serve()
    workers.start()
    wait_until(lambda: "14 of 24 slots of the CPU tier can be used" in caplog.text)
    assert workers.progress.usable() == 14
    [warning] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "worker 1" in warning and "cpu_bytes_to_use" in warning
    assert workers.progress.slots_of(7) not in workers.pinned[0]


def test_a_shortage_at_the_start_is_an_error(workers: Workers) -> None:
    workers.short = workers.progress.slots_of(1)
    workers.reservers[0].reserve_first()
    with pytest.raises(RegionError, match="cpu_bytes_to_use"):
        workers.reservers[1].reserve_first()


def test_a_device_that_refuses_leaves_the_rest_out(
    workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    workers.refused = workers.progress.slots_of(5)
    workers.progress.serve()
    workers.start()
    wait_until(lambda: "10 of 24 slots of the CPU tier can be used" in caplog.text)
    [warning] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "worker 1: could not pin" in warning


def test_a_shutdown_waits_for_what_is_under_way_and_no_more(workers: Workers) -> None:
    for reserver in workers.reservers:
        reserver.reserve_first()
    workers.gate = threading.Event()
    workers.reservers[0].start(lambda slots: None)
    wait_until(lambda: workers.waiting > 0)
    stopping = threading.Thread(target=workers.reservers[0].stop)
    stopping.start()
    wait_until(workers.reservers[0]._stop.is_set)
    workers.gate.set()
    stopping.join(PATIENCE_S)
    assert not stopping.is_alive()
    assert len(workers.reserved) == 2 + workers.waiting < 12
    workers.reservers[0].stop()


def test_a_shutdown_before_the_scheduler_is_there(workers: Workers) -> None:
    workers.start()
    workers.stop()
    assert workers.pinned == [[], []] and workers.progress.usable() == 4


def test_a_worker_of_a_small_tier_has_no_threads(tmp_path: Path) -> None:
    fields = {"slots": 3, "slot_bytes": SLOT_BYTES, "workers": 1}
    region = create_region("small", fields, directory=tmp_path)
    reserver = Reserver(region, 0)
    assert reserver.reserve_first() == range(3)
    reserver.start(lambda slots: None)
    assert not reserver._threads and region.progress.usable() == 3
    reserver.stop()
