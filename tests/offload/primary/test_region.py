"""The shared region: layout, life cycle, kills, races, and too little memory."""

import ctypes
import errno
import fcntl
import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.offload.primary import region as region_module
from kvstrata.offload.primary.region import (
    ALIGNMENT,
    HEADER_TEXT_BYTES,
    Region,
    RegionError,
    count_slots,
    create_region,
    open_region,
    region_path,
    round_up,
)


def fields(slots: int = 3, slot_bytes: int = 8192, workers: int = 2, **more: Any) -> dict[str, Any]:
    return {"slots": slots, "slot_bytes": slot_bytes, "workers": workers, **more}


def create(directory: Path, engine_id: str = "engine", **more: Any) -> Region:
    return create_region(engine_id, fields(**more), directory=directory)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def shm() -> Iterator[Path]:
    """A folder of this test in /dev/shm: whatever starts there removes what a kill left."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


# -- layout -----------------------------------------------------------------------


def test_fields_round_trip(tmp_path: Path) -> None:
    sent = fields(model="a/ü", layouts={"0": {"tensors": [["kv", "F16", [2, 3]]]}}, namespace=None)
    create_region("engine", sent, directory=tmp_path)
    found = open_region("engine", tmp_path)
    assert {key: found.fields[key] for key in sent} == sent
    assert (found.slots, found.slot_bytes) == (3, 8192)


def test_slots_are_aligned_and_shared(tmp_path: Path) -> None:
    made = create(tmp_path)
    opened = open_region("engine", tmp_path)
    assert made.pages.shape == (3, 8192) and made.pages.dtype == np.uint8
    for region in (made, opened):
        assert region.pages.ctypes.data % ALIGNMENT == 0
        assert region.pages.flags.c_contiguous and region.pages.flags.writeable
    for slot in range(3):
        view = made.view(slot, 5000)
        assert (view.nbytes, view.format, view.contiguous, view.readonly) == (
            5000,
            "B",
            True,
            False,
        )
        view[:] = bytes([slot + 1]) * 5000
    for slot in range(3):
        assert opened.pages[slot].tobytes() == bytes([slot + 1]) * 5000 + bytes(8192 - 5000)
    assert opened.watermark() == 0 and all(opened.is_complete(slot) for slot in range(3))


def test_nothing_in_the_header_overlaps(tmp_path: Path) -> None:
    """Filling one part leaves the others as they were."""
    made = create(tmp_path, slots=70, slot_bytes=4096, workers=3)
    made.pages[:] = 0xFF
    for rank in range(3):
        made.set_watermark(rank, 2**40 + rank)
    for slot in range(0, 70, 2):
        made.set_incomplete(slot, True)
    opened = open_region("engine", tmp_path)
    assert opened.fields == made.fields
    assert opened.watermark() == 2**40
    assert [opened.is_complete(slot) for slot in range(70)] == [n % 2 == 1 for n in range(70)]
    assert (opened.pages == 0xFF).all()


def test_watermark_is_the_slowest_worker(tmp_path: Path) -> None:
    made = create(tmp_path, workers=3)
    opened = open_region("engine", tmp_path)
    seen = []
    for rank, ticket in ((0, 5), (2, 3), (1, 1), (1, 9), (2, 8)):
        made.set_watermark(rank, ticket)
        seen.append(opened.watermark())
    assert seen == [0, 0, 1, 3, 5]


def test_completeness_changes_both_ways(tmp_path: Path) -> None:
    made, opened = create(tmp_path), open_region("engine", tmp_path)
    made.set_incomplete(1, True)
    assert [opened.is_complete(slot) for slot in range(3)] == [True, False, True]
    made.set_incomplete(1, False)
    assert opened.is_complete(1)


def test_header_text_too_long(tmp_path: Path) -> None:
    with pytest.raises(RegionError, match=r"takes 1048[0-9]{3} bytes, 1048576 were kept"):
        create(tmp_path, model="m" * HEADER_TEXT_BYTES)
    assert names(tmp_path) == []


@given(
    st.integers(0, 2**34),
    st.integers(1, 2**10).map(lambda n: n * ALIGNMENT),
    st.integers(1, 64),
)
def test_count_slots_is_the_most_that_fits(total: int, slot_bytes: int, workers: int) -> None:
    def size(slots: int) -> int:
        header = round_up(16 + HEADER_TEXT_BYTES, ALIGNMENT) + 64 * workers + slots
        return round_up(header, ALIGNMENT) + slots * slot_bytes

    slots = count_slots(total, slot_bytes, workers)
    assert slots >= 0
    assert slots == 0 or size(slots) <= total
    assert size(slots + 1) > total


def test_count_slots_at_the_boundary(tmp_path: Path) -> None:
    """The file that is made has exactly the size that was counted."""
    # the text, behind the magic; the marks and the completeness bytes
    header = HEADER_TEXT_BYTES + 2 * 4096
    assert count_slots(header + 3 * 8192, 8192, 2) == 3
    assert count_slots(header + 3 * 8192 - 1, 8192, 2) == 2
    assert count_slots(header + 8192 - 1, 8192, 2) == 0
    assert create(tmp_path).path.stat().st_size == header + 3 * 8192


def test_count_slots_of_an_absurd_size() -> None:
    """A closed form: stepping down from 2**60 bytes would take years."""
    assert 2**47 < count_slots(2**60, ALIGNMENT, 1) < 2**48


# -- names and life cycle ---------------------------------------------------------


@pytest.mark.parametrize("engine_id", ["../../etc/x", "a b\n\0", "ü*?[x]", "..", ""])
def test_any_engine_id_stays_in_the_directory(engine_id: str, tmp_path: Path) -> None:
    made = create(tmp_path, engine_id)
    assert made.path.parent == tmp_path and names(tmp_path) == [made.path.name]
    assert made.path.name.startswith(f"kvstrata_{os.getuid()}_")
    assert open_region(engine_id, tmp_path).fields == made.fields


def test_engine_id_too_long_for_a_name(tmp_path: Path) -> None:
    with pytest.raises(RegionError, match="cannot create"):
        create(tmp_path, "x" * 300)


def test_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        create(tmp_path / "absent")


def test_the_file_is_private(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        mode = create(tmp_path).path.stat().st_mode
    finally:
        os.umask(old)
    assert stat.S_IMODE(mode) == 0o600


def test_unlink_keeps_the_memory(tmp_path: Path) -> None:
    made, opened = create(tmp_path), open_region("engine", tmp_path)
    opened.unlink()
    opened.unlink()
    assert names(tmp_path) == []
    made.view(2, 4)[:] = b"page"
    assert bytes(opened.view(2, 4)) == b"page"
    opened.close()
    opened.close()
    assert bytes(opened.view(2, 4)) == b"page"


def test_open_without_create(tmp_path: Path) -> None:
    with pytest.raises(RegionError, match=r"cannot open the page region .* one host and share"):
        open_region("engine", tmp_path)


@pytest.mark.parametrize("content", [b"", b"kvstrat1", b"x" * 5000, b"kvstrat1" + b"\xff" * 100])
def test_open_something_else(content: bytes, tmp_path: Path) -> None:
    region_path("engine", tmp_path).write_bytes(content)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(RegionError, match="cannot use the page region"):
        open_region("engine", tmp_path)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_open_a_region_cut_short(tmp_path: Path) -> None:
    made = create(tmp_path)
    with open(made.path, "r+b") as file:
        file.truncate(4096 * 3)
    with pytest.raises(RegionError, match="cannot use the page region"):
        open_region("engine", tmp_path)


def test_open_a_header_without_its_fields(tmp_path: Path) -> None:
    text = json.dumps({"slots": 1}).encode()
    prefix = b"kvstrat1" + len(text).to_bytes(8, "little")
    region_path("engine", tmp_path).write_bytes(prefix + text + bytes(9000))
    with pytest.raises(RegionError, match="cannot use the page region"):
        open_region("engine", tmp_path)


def test_symlink_at_the_path(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    link = region_path("engine", tmp_path)
    link.symlink_to(target)
    with pytest.raises(RegionError, match="cannot open"):
        open_region("engine", tmp_path)
    with pytest.raises(RegionError, match="engine_id 'engine' is in use"):
        create(tmp_path)
    assert target.read_bytes() == b"precious"


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    uid = os.getuid()
    others = [f"kvstrata_{uid + 1}_x", "kvstrata_x", f"other_kvstrata_{uid}_x", "vllm_x"]
    for name in others:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / f"kvstrata_{uid}_directory").mkdir()
    made = create(tmp_path)
    expected = [*others, f"kvstrata_{uid}_directory", made.path.name]
    assert names(tmp_path) == sorted(expected)


# -- who holds it -----------------------------------------------------------------


def test_abandoned_files_are_removed(tmp_path: Path) -> None:
    """Also the engine's own name, and also a file that was cut short."""
    for engine_id in ("engine", "another"):
        region_path(engine_id, tmp_path).write_bytes(b"left by a kill")
    made = create(tmp_path)
    assert names(tmp_path) == [made.path.name]
    assert open_region("engine", tmp_path).fields == made.fields


def test_living_engine_keeps_its_file(tmp_path: Path) -> None:
    first = create(tmp_path, "first")
    second = create(tmp_path, "second")
    assert names(tmp_path) == sorted([first.path.name, second.path.name])
    with pytest.raises(RegionError, match=r"engine_id 'first' is in use: .* another engine_id"):
        create(tmp_path, "first")
    assert open_region("first", tmp_path).fields == first.fields


def test_reader_alone_keeps_the_file(tmp_path: Path) -> None:
    """Rank 0 is gone; a worker that still maps the region is alive."""
    child = subprocess.run(
        [sys.executable, "-c", CREATE, str(tmp_path), "engine"], capture_output=True, check=True
    )
    assert child.stdout == b"created\n"
    reader = open_region("engine", tmp_path)
    with pytest.raises(RegionError, match="in use"):
        create(tmp_path)
    reader.close()
    with pytest.raises(RegionError, match="in use"):
        create(tmp_path)  # the mapping is still there
    del reader
    create(tmp_path)


CREATE = """
import signal, sys
from pathlib import Path
from kvstrata.offload.primary.region import create_region
fields = {"slots": 3, "slot_bytes": 8192, "workers": 2}
directory, engine_id, *wait = sys.argv[1:]
region = create_region(engine_id, fields, directory=Path(directory))
print("created", flush=True)
if wait:
    signal.pause()
"""


def test_sigkill_before_unlink(shm: Path) -> None:
    """In /dev/shm: while the process lives its name is taken; after SIGKILL it is cleaned."""
    with subprocess.Popen(
        [sys.executable, "-c", CREATE, str(shm), "engine", "wait"], stdout=subprocess.PIPE
    ) as child:
        try:
            assert child.stdout is not None and child.stdout.readline() == b"created\n"
            with pytest.raises(RegionError, match="in use"):
                create(shm)
        finally:
            child.send_signal(signal.SIGKILL)
    left = region_path("engine", shm)
    inode = left.stat().st_ino
    made = create(shm)
    assert left.stat().st_ino == os.fstat(made._fd).st_ino != inode
    made.unlink()


def test_file_removed_before_it_was_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another start takes the new file for abandoned: the name is made again."""
    stolen = []

    def flock(fd: int, operation: int) -> None:
        if operation == fcntl.LOCK_SH and not stolen:
            path = region_path("engine", tmp_path)
            stolen.append(path.stat().st_ino)
            region_module._remove_abandoned(tmp_path)  # our own file, not locked yet
            assert not path.exists()
        real(fd, operation)

    real = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    made = create(tmp_path)
    assert stolen and open_region("engine", tmp_path).fields == made.fields


def test_name_taken_over_before_it_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The abandoned file is replaced by a living engine's between open and lock."""
    path = region_path("engine", tmp_path)
    path.write_bytes(b"abandoned")
    living = []

    def flock(fd: int, operation: int) -> None:
        if operation == fcntl.LOCK_EX | fcntl.LOCK_NB and not living:
            path.unlink()
            living.append(None)
            living[0] = create(tmp_path)
        real(fd, operation)

    real = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(RegionError, match="in use"):
        create(tmp_path)
    assert living and open_region("engine", tmp_path).fields == living[0].fields


def _race(directory: Path, engine_id: str, barrier: Any, results: Any) -> None:
    barrier.wait()
    try:
        region = create_region(engine_id, fields(), directory=directory)
        same = os.fstat(region._fd).st_ino == region.path.stat().st_ino
        results.put("created" if same else "lost its file")
    except RegionError as error:
        results.put("refused" if "in use" in str(error) else str(error))
    barrier.wait()  # whoever created it holds it until the other has answered


@pytest.mark.parametrize("engine_ids", [("one", "one"), ("one", "two")])
def test_two_processes_race(engine_ids: tuple[str, str], tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for _ in range(20):
        for engine_id in engine_ids:
            region_path(engine_id, tmp_path).write_bytes(b"abandoned")
        barrier, results = context.Barrier(2), context.SimpleQueue()
        children = [
            context.Process(target=_race, args=(tmp_path, engine_id, barrier, results))
            for engine_id in engine_ids
        ]
        for child in children:
            child.start()
        answers = sorted(results.get() for _ in children)
        for child in children:
            child.join()
        expected = ["created", "refused"] if len(set(engine_ids)) == 1 else ["created"] * 2
        assert answers == expected


# -- too little memory ------------------------------------------------------------

MIB = 2**20


def test_directory_too_small_says_by_how_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = os.statvfs_result((4096, 4096, 999, 999, 64 * 256, 9, 9, 9, 0, 255))  # 64 MiB
    monkeypatch.setattr(os, "statvfs", lambda path: free)
    with pytest.raises(RegionError) as caught:
        create(tmp_path, slots=100, slot_bytes=MIB)
    text = str(caught.value)
    assert "needs 101.0 MiB of" in text
    assert "but 64.0 MiB are free, 37.0 MiB are missing" in text
    assert str(tmp_path) in text and "cpu_bytes_to_use" in text and "--shm-size" in text
    assert names(tmp_path) == []


def test_a_directory_without_a_limit_is_bounded_by_memory_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tmpfs without a limit reports no blocks at all."""
    none = os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: none)
    create(tmp_path, slots=4, slot_bytes=MIB).close()
    monkeypatch.setattr(region_module, "available_memory", lambda: 3 * MIB)
    with pytest.raises(RegionError, match=r"of RAM but 3\.0 MiB are free"):
        create(tmp_path, slots=4, slot_bytes=MIB)


def test_memory_too_small_says_by_how_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region_module, "available_memory", lambda: 30 * MIB)
    with pytest.raises(
        RegionError, match=r"101\.0 MiB of RAM but 30\.0 MiB are free, 71\.0 MiB are"
    ):
        create(tmp_path, slots=100, slot_bytes=MIB)
    assert names(tmp_path) == []


def test_memory_taken_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check passed but the reservation fails: an error, and no file stays."""

    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(RegionError, match=r"needs .* of .* too little is free"):
        create(tmp_path)
    assert names(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == len(before)


# -- memory for the slots ---------------------------------------------------------


def memory_of(region: Region) -> int:
    """Bytes of the file that have memory."""
    return os.fstat(region._fd).st_blocks * 512


@pytest.fixture
def made(shm: Path) -> Region:
    """A region in /dev/shm of 8 slots of 1 MiB, of which none has memory."""
    region = create(shm, slots=8, slot_bytes=MIB)
    assert memory_of(region) < 2 * MIB
    return region


def test_slots_get_memory_when_they_are_told_to(made: Region) -> None:
    header = memory_of(made)
    made.reserve(range(2, 5))
    assert memory_of(made) - header == 3 * MIB
    made.reserve(range(0, 8))
    assert memory_of(made) - header == 8 * MIB
    assert not made.pages.any()


def older_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def madvise(*arguments: int) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(region_module, "_madvise", madvise)


def test_slots_get_memory_from_an_older_kernel(
    made: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    older_kernel(monkeypatch)
    header = memory_of(made)
    made.reserve(range(2, 5))
    assert memory_of(made) - header == 3 * MIB


@pytest.mark.parametrize("slots", [range(1), range(3, 8)])
def test_pages_that_are_larger_than_a_slots_alignment(
    slots: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """madvise takes whole pages: where they have 64 KiB, those in which a slot begins or ends."""
    asked = []
    monkeypatch.setattr(region_module.mmap, "PAGESIZE", 65536)
    monkeypatch.setattr(region_module, "_madvise", lambda *arguments: asked.append(arguments))
    made = create(tmp_path, slots=8, slot_bytes=4096)
    made.reserve(slots)
    [(address, nbytes, advice)] = asked
    first = made.pages[slots.start].ctypes.data
    assert address % 65536 == 0 and first - 65536 < address <= first and advice == 23
    assert address + nbytes == first + len(slots) * 4096


@pytest.mark.parametrize("number", [errno.EFAULT, errno.ENOMEM])
def test_slots_for_which_there_is_no_memory(
    number: int, made: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EFAULT where touching would end in SIGBUS: /dev/shm is full."""

    def madvise(*arguments: int) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(region_module, "_madvise", madvise)
    with pytest.raises(
        RegionError, match=r"needs another 3\.0 MiB of /dev/shm.* .*cpu_bytes_to_use"
    ):
        made.reserve(range(2, 5))


def test_slots_for_which_an_older_kernel_has_no_memory(
    made: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    older_kernel(monkeypatch)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(RegionError, match=r"needs another 3\.0 MiB of /dev/shm"):
        made.reserve(range(2, 5))


def test_slots_are_not_reserved_where_the_kernel_would_kill(
    made: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(region_module, "available_memory", lambda: MIB)
    header = memory_of(made)
    with pytest.raises(
        RegionError, match=r"another 3\.0 MiB of RAM but 1\.0 MiB are free, 2\.0 MiB"
    ):
        made.reserve(range(2, 5))
    assert memory_of(made) == header


def test_more_than_the_machine_has(shm: Path) -> None:
    """For real: nothing is reserved, and the error comes before any file does."""
    slots = count_slots(2**50, MIB, 1)
    with pytest.raises(RegionError, match="are missing"):
        create(shm, slots=slots, slot_bytes=MIB, workers=1)
    assert names(shm) == []
