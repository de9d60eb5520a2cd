"""A recording: what it says of requests, where it lies, and when it ends."""

import errno
import logging
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvstrata.offload.metering import recording, recording_file
from kvstrata.offload.metering.recording import Recording
from kvstrata.offload.metering.recording_file import RecordingFile
from kvstrata.offload.simulate.traces import read_trace
from tests.waiting import wait_until

TOKENS = 16
NEVER_S = 1e6


def keys(*numbers: int, group: int = 0) -> dict[bytes, int]:
    """Chunks of a prompt, with their end tokens."""
    return {
        bytes([number]) * 32 + group.to_bytes(4, "big"): TOKENS * at
        for at, number in enumerate(numbers, 1)
    }


def record(path: Path, every_s: float = NEVER_S, engine: int = 0) -> Recording:
    file = RecordingFile(str(path), engine)
    return Recording(file, group=0, tokens=TOKENS, nbytes=4096, model="m", every_s=every_s)


def names(path: Path) -> list[list[bytes]]:
    """The chunks of each request, as the simulator reads them."""
    return [request.keys for request in read_trace(str(path)).requests]


def test_the_simulator_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "requests"
    recorded = record(path)
    began = recorded._began
    recorded.add(began + 2.5, 40, 7, keys(1, 2))
    recorded.add(began + 1.0, 33, 0, keys(1, 3, 4))  # a chunk of what was generated is behind
    recorded.add(began + 3.0, 15, 1, {})
    recorded.close()
    trace = read_trace(str(path))
    assert (trace.tokens_per_chunk, trace.bytes_per_chunk, trace.model) == (TOKENS, 4096, "m")
    found = [(each.at, each.tokens, each.generated) for each in trace.requests]
    assert found == [(0.0, 33, 0), (1.5, 40, 7), (2.0, 15, 1)]
    second, first, third = names(path)
    assert (len(first), len(second), len(third)) == (2, 2, 0)
    assert first[0] == second[0] and first[1] != second[1]


def test_chunks_of_other_groups_and_ends_inside_chunks_are_left_out(tmp_path: Path) -> None:
    recorded = record(tmp_path / "requests")
    recorded.add(0.0, 40, 0, {**keys(1, 2), **keys(3, 4, group=1), b"end" + bytes(4): 39})
    recorded.close()
    assert '["' in (text := (tmp_path / "requests").read_text().splitlines()[1])
    assert text.count(",", text.index("[")) == 1


def test_a_request_that_was_never_looked_up_is_left_out(tmp_path: Path) -> None:
    recorded = record(tmp_path / "requests")
    recorded.add(0.0, 40, 0, {})
    recorded.add(0.0, 40, 0, keys(1, 2))
    recorded.close()
    assert len(names(tmp_path / "requests")) == 1


def test_nothing_says_what_was_asked(tmp_path: Path) -> None:
    """Names are not the hashes, and differ in each file: who guesses a prompt cannot see it."""
    lines = []
    for _ in range(2):
        recorded = record(tmp_path / "requests")
        recorded.add(0.0, 40, 0, keys(171, 2))
        recorded.close()
        lines.append(Path(recorded._file.path).read_text().splitlines()[1])
    assert "abab" not in lines[0] and len(set(lines)) == 2
    assert len(lines[0]) == len(lines[1]) < 120


def test_earlier_recordings_stay(tmp_path: Path) -> None:
    path = tmp_path / "requests"
    (tmp_path / "requests.1").symlink_to(tmp_path / "elsewhere")
    made = [RecordingFile(str(path), engine) for engine in (0, 0, 2, 2)]
    for each in made:
        each.close()
    assert [Path(each.path).name for each in made] == [
        "requests",
        "requests.2",
        "requests.engine2",
        "requests.engine2.1",
    ]
    assert not (tmp_path / "elsewhere").exists()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_it_is_written_while_the_engine_serves(tmp_path: Path) -> None:
    recorded = record(tmp_path / "requests", every_s=0.001)
    recorded.add(0.0, 40, 0, keys(1, 2))
    wait_until(lambda: len((tmp_path / "requests").read_text().splitlines()) == 2)
    recorded.close()


def test_what_is_too_much_is_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recording, "_MOST_WAITING", 6)
    recorded = record(tmp_path / "requests")
    for _ in range(5):
        recorded.add(0.0, 40, 0, keys(1, 2))
    recorded.close()
    assert len(names(tmp_path / "requests")) == 2
    assert "2 requests are in it, 3 were left out" in caplog.text


def test_it_does_not_grow_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recording_file, "MOST_BYTES", 300)
    recorded = record(tmp_path / "requests")
    for _ in range(9):
        recorded.add(0.0, 40, 0, keys(1, 2))
    recorded.close()
    assert 0 < len(names(tmp_path / "requests")) < 9
    assert (tmp_path / "requests").stat().st_size <= 300
    assert "has ended (it is as large as it may become)" in caplog.text


def full_after(nbytes: int) -> Callable[[int, memoryview], int]:
    """`os.write` on a disk that has room for so much, and takes ten bytes at a time."""
    write, left = os.write, [nbytes]

    def limited(file: int, data: memoryview) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = write(file, data[: min(10, left[0])])
        left[0] -= taken
        return taken

    return limited


def test_a_full_disk_ends_it_after_a_whole_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recording_file.os, "write", full_after(300))
    recorded = record(tmp_path / "requests", every_s=0.001)
    caplog.set_level(logging.WARNING)
    while not caplog.records:
        recorded.add(0.0, 40, 0, keys(1, 2))
    recorded.add(0.0, 40, 0, keys(1, 2))  # nobody keeps it
    assert not recorded._waiting
    recorded.close()
    monkeypatch.undo()
    assert names(tmp_path / "requests")
    (line,) = [each.getMessage() for each in caplog.records]
    assert "No space left on device" in line


def test_a_disk_that_hangs_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, goes_on = threading.Event(), threading.Event()
    write = os.write

    def hang(file: int, data: Any) -> int:
        hangs.set()
        goes_on.wait()
        return write(file, data)

    monkeypatch.setattr(recording_file.os, "write", hang)
    monkeypatch.setattr(recording, "_STOP_S", 0.0)
    recorded = record(tmp_path / "requests")
    hangs.wait()
    recorded.add(0.0, 40, 0, keys(1, 2))
    recorded.close()
    goes_on.set()
    recorded._thread.join()
