"""What the page cache holds is seen without changing it."""

import ctypes
import errno
import os
from pathlib import Path

import pytest

from kvstrata.tiers.fs.files import residency
from kvstrata.tiers.fs.files.direct_io import probe_direct
from kvstrata.tiers.fs.files.residency import is_cached


@pytest.fixture(autouse=True, params=["cachestat", "mincore"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the kernel is asked; old ones know only the second."""
    if request.param == "mincore":
        monkeypatch.setattr(residency, "_CACHESTAT", -1)
    else:
        asked = residency._libc.syscall(residency._CACHESTAT, -1, None, None, 0)
        if asked == 0 or ctypes.get_errno() != errno.EBADF:
            pytest.skip("this kernel has no cachestat")
        monkeypatch.setattr(residency, "_by_mincore", lambda fd, size, pages: False)


@pytest.fixture
def on_disk(tmp_path: Path) -> int:
    """A file of five and a half pages, none of them in the page cache."""
    if not probe_direct(str(tmp_path)):
        pytest.skip("a file system that lives in the page cache")
    path = tmp_path / "file"
    path.write_bytes(bytes(5 * 4096 + 2048))
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return fd


def test_what_was_just_written_is_cached(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(3 * 4096 + 7))
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    assert is_cached(fd, 3 * 4096 + 7)
    assert is_cached(fd, 1)
    os.close(fd)


def test_looking_reads_nothing(on_disk: int) -> None:
    for _ in range(3):
        assert not is_cached(on_disk, 5 * 4096 + 2048)
        assert not is_cached(on_disk, 4096)
    os.close(on_disk)


def test_a_part_is_not_the_whole(on_disk: int) -> None:
    os.posix_fadvise(on_disk, 0, 0, os.POSIX_FADV_RANDOM)  # no readahead
    os.pread(on_disk, 1, 4096)
    assert not is_cached(on_disk, 5 * 4096 + 2048)
    os.pread(on_disk, 5 * 4096 + 2048, 0)
    assert is_cached(on_disk, 5 * 4096 + 2048)
    os.close(on_disk)


def test_files_that_we_may_not_write_count_as_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(bytes(4096))
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    monkeypatch.setattr(residency, "_CACHESTAT", -1)  # it knows by itself
    monkeypatch.setattr(residency.os, "access", lambda path, mode: False)
    assert not is_cached(fd, 4096)  # the kernel would say yes to anything
    os.close(fd)


def test_what_cannot_be_mapped_counts_as_absent(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    fd = os.open(tmp_path / "fifo", os.O_RDWR)
    assert not is_cached(fd, 4096)
    os.close(fd)
