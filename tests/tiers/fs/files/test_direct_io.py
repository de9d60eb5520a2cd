"""Whole files through short transfers, odd sizes, and file systems without O_DIRECT."""

import errno
import fcntl
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kvstrata.tiers.base import PageLayout, TensorSpec, TierContext
from kvstrata.tiers.fs.files import direct_io as io
from kvstrata.tiers.fs.files.direct_io import FileIO, aligned_buffer, probe_direct
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.testing import Slots, finish, make_data, make_job, make_key

SIZES = [1, 511, 512, 513, 4095, 4096, 4097, 8192, 8200, 12288 + 2048, 3 * 4096 + 7]


@pytest.fixture(params=["auto", "direct", "buffered"])
def file_io(request: pytest.FixtureRequest, tmp_path: Path) -> FileIO:
    if request.param != "buffered" and not probe_direct(str(tmp_path)):
        pytest.skip("no O_DIRECT here")
    return FileIO(request.param != "buffered", cached_first=request.param == "auto")


def buffers(size: int) -> list[memoryview]:
    return [aligned_buffer(4096), aligned_buffer(size)[:size]]


def write_then_read(file_io: FileIO, path: Path, size: int) -> None:
    parts = buffers(size)
    parts[0][:], parts[1][:] = make_data(1, 4096), make_data(2, size)
    fd = file_io.open(str(path), os.O_WRONLY | os.O_CREAT)
    file_io.write(fd, parts)
    os.close(fd)
    assert path.read_bytes() == make_data(1, 4096) + make_data(2, size)
    back = buffers(size)
    fd = file_io.open(str(path), os.O_RDONLY)
    file_io.read(fd, back)
    os.close(fd)
    assert b"".join(back) == path.read_bytes()


@pytest.mark.parametrize("size", SIZES)
def test_any_size(file_io: FileIO, tmp_path: Path, size: int) -> None:
    write_then_read(file_io, tmp_path / "file", size)


@pytest.mark.parametrize("most", [1, 512, 4096, 5000])
def test_short_transfers(
    file_io: FileIO, tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    writev, readv = os.pwritev, os.preadv

    def short(call: Callable[..., int]) -> Callable[..., int]:
        def transfer(fd: int, parts: Sequence[memoryview], position: int, *flags: int) -> int:
            direct = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
            size = max(most, 4096) // 4096 * 4096 if direct else most
            return call(fd, [parts[0][:size]], position, *flags)

        return transfer

    monkeypatch.setattr(io.os, "pwritev", short(writev))
    monkeypatch.setattr(io.os, "preadv", short(readv))
    write_then_read(file_io, tmp_path / "file", 5001)


def test_falls_back_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not probe_direct(str(tmp_path)):
        pytest.skip("no O_DIRECT here")
    writev = os.pwritev

    def refuse(fd: int, parts: Sequence[memoryview], position: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return writev(fd, parts, position)

    monkeypatch.setattr(io.os, "pwritev", refuse)
    file_io = FileIO(True)
    for number in range(3):
        write_then_read(file_io, tmp_path / f"file{number}", 8192)
    assert not file_io.direct
    assert len(caplog.records) == 1 and "buffered" in caplog.text


@pytest.mark.parametrize("cached", [True, False])
def test_what_is_cached_is_read_from_there(
    tmp_path: Path, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not probe_direct(str(tmp_path)):
        pytest.skip("no O_DIRECT here")
    path, data = tmp_path / "file", make_data(1, 4096) + make_data(2, 2**18)
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    if not cached:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    ways: list[str] = []
    readv = os.preadv

    def note(fd: int, parts: Sequence[memoryview], position: int, *flags: int) -> int:
        ways.append("direct" if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT else "buffered")
        return readv(fd, parts, position, *flags)

    monkeypatch.setattr(io.os, "preadv", note)
    file_io = FileIO(True, cached_first=True)
    for _ in range(2):  # neither the look nor the direct read leaves anything in the cache
        ways.clear()
        fd = file_io.open(str(path), os.O_RDONLY)
        back = buffers(2**18)
        file_io.read(fd, back)
        os.close(fd)
        assert b"".join(back) == data
        assert ways == ["buffered" if cached else "direct"]


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_nowait(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    readv = os.preadv

    def refuse(fd: int, parts: Sequence[memoryview], position: int, *flags: int) -> int:
        if flags:
            raise OSError(number, os.strerror(number))
        return readv(fd, parts, position)

    monkeypatch.setattr(io.os, "preadv", refuse)
    for _ in range(2):
        write_then_read(FileIO(True, cached_first=True), tmp_path / "file", 9000)


def test_misaligned_memory_is_served_all_the_same(tmp_path: Path) -> None:
    file_io = FileIO(True)
    part = aligned_buffer(3 * 4096)[7 : 7 + 8192]
    part[:] = make_data(3, 8192)
    fd = file_io.open(str(tmp_path / "file"), os.O_WRONLY | os.O_CREAT)
    file_io.write(fd, [part])
    os.close(fd)
    assert (tmp_path / "file").read_bytes() == make_data(3, 8192)


def test_a_file_that_is_too_short(file_io: FileIO, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(5000))
    fd = file_io.open(str(tmp_path / "file"), os.O_RDONLY)
    with pytest.raises(EOFError):
        file_io.read(fd, buffers(8192))
    os.close(fd)


def test_writing_nothing_is_an_error(
    file_io: FileIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(io.os, "pwritev", lambda *args: 0)
    fd = file_io.open(str(tmp_path / "file"), os.O_WRONLY | os.O_CREAT)
    with pytest.raises(OSError):
        file_io.write(fd, buffers(4096))
    os.close(fd)


def test_other_errors_are_raised(
    file_io: FileIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError):
        file_io.open(str(tmp_path / "none"), os.O_RDONLY)
    (tmp_path / "link").symlink_to("none")
    with pytest.raises(OSError) as caught:
        file_io.open(str(tmp_path / "link"), os.O_RDONLY)
    assert caught.value.errno == errno.ELOOP


def test_the_probe_leaves_nothing(tmp_path: Path) -> None:
    probe_direct(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        probe_direct(str(tmp_path / "none"))


@pytest.mark.parametrize("durability", ["none", "fsync"])
def test_pages_of_any_size(open_tier: Callable[..., FsTier], durability: str) -> None:
    """Each size is that of a group."""
    layouts = {g: PageLayout((TensorSpec("kv", "U8", (1, n)),), 16) for g, n in enumerate(SIZES)}
    context = TierContext("model", {"sizes": list(SIZES)}, layouts)
    tier = open_tier(context, durability=durability)
    for group, size in enumerate(SIZES):
        slots = Slots.make(2, size)
        keys = [make_key(number, group) for number in range(2)]
        data = [make_data(number, size) for number in range(2)]
        for slot in range(2):
            slots.view(slot)[:] = data[slot]
        tier.submit_store(make_job(1, keys, slots, context))
        assert not finish(tier)[0].failed
        back = Slots.make(2, size)
        tier.submit_load(make_job(2, keys, back, context))
        assert not finish(tier)[0].failed
        back.check_guards()
        assert [bytes(back.view(slot)) for slot in range(2)] == data
