"""What a configuration asks for and this machine cannot have, found before a model is loaded."""

import os
from pathlib import Path
from typing import Any

import pytest

from kvstrata.offload.config import precheck
from kvstrata.offload.config.offload_config import OffloadConfig, parse_config
from kvstrata.offload.config.precheck import check_here, check_size
from kvstrata.tiers.options import ConfigError

GIB = 2**30


def config(*roots: object, size: int = 2**20) -> OffloadConfig:
    entries = [{"type": "fs", "root_dir": root} for root in roots]
    return parse_config({"cpu_bytes_to_use": size, "secondary_tiers": entries})


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes of its memory and of its /dev/shm, `tmp_path`."""
    sizes = {"memory": 8 * GIB, "shm": 4 * GIB}
    pages = {"SC_PAGE_SIZE": 4096}
    real = os.statvfs(tmp_path)

    def statvfs(path: Path) -> Any:
        blocks = sizes["shm"] // real.f_frsize
        return os.statvfs_result((*real[:2], blocks, 0, 0, *real[5:]))

    monkeypatch.setattr(
        precheck.os, "sysconf", lambda name: pages.get(name, sizes["memory"] // 4096)
    )
    monkeypatch.setattr(precheck.os, "statvfs", statvfs)
    return sizes


def test_what_fits_passes_however_little_is_free(tmp_path: Path, machine: dict[str, int]) -> None:
    check_size(4 * GIB, tmp_path)
    machine["shm"] = 0  # without a limit
    check_size(8 * GIB, tmp_path)


def test_more_than_there_is(tmp_path: Path, machine: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"cpu_bytes_to_use: 5\.0 GiB .*4\.0 GiB.*--shm-size"):
        check_size(5 * GIB, tmp_path)
    with pytest.raises(ConfigError, match=r"cpu_bytes_to_use: 9\.0 GiB .*memory, 8\.0 GiB: lower"):
        check_size(9 * GIB, tmp_path)


def test_without_shared_memory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cpu_bytes_to_use: .*/absent.*mount a tmpfs"):
        check_size(2**20, tmp_path / "absent")


def test_directories_are_named_with_their_tier(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check_here(config(str(tmp_path / "a"), str(tmp_path / "b")))
    with pytest.raises(ConfigError, match=r"secondary_tiers\[1\]: '.*/file' is not a directory"):
        check_here(config(str(tmp_path / "a"), str(tmp_path / "file")))
    assert os.listdir(tmp_path) == ["file"]


def test_what_is_not_required_is_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    entry = {"type": "fs", "root_dir": str(tmp_path / "file"), "required": False}
    check_here(parse_config({"cpu_bytes_to_use": 2**20, "secondary_tiers": [entry]}))


def test_directories_that_links_make_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for other in (tmp_path / "b", tmp_path / "b" / "inner"):
        with pytest.raises(ConfigError, match=r"secondary_tiers\[1\]: '.*/a' and .* lead to one"):
            config(str(tmp_path / "a"), str(other))
    with pytest.raises(ConfigError, match=r"secondary_tiers\[0\]: .* lead to one"):
        config([str(tmp_path / "a"), str(tmp_path / "b")])


def test_a_recording_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recording(path: Path) -> OffloadConfig:
        return parse_config({"cpu_bytes_to_use": 2**20, "record": str(path)})

    check_here(recording(tmp_path / "requests"))
    (tmp_path / "requests").touch()  # an earlier one, which stays
    check_here(recording(tmp_path / "requests"))
    with pytest.raises(ConfigError, match=r"record: '.*/a/b': there is no directory '.*/a'; make"):
        check_here(recording(tmp_path / "a" / "b"))
    with pytest.raises(ConfigError, match=r"record: '/dev/full': something is there that is no f"):
        check_here(recording(Path("/dev/full")))
    with pytest.raises(ConfigError, match=r"record: .*: it is a directory; give a file in it"):
        check_here(recording(tmp_path))
    monkeypatch.setattr(precheck.os, "access", lambda *_, **__: False)  # tests may be root's
    with pytest.raises(ConfigError, match=r"record: .*: no file can be made in '/.*'; let this"):
        check_here(recording(tmp_path / "requests"))
    assert os.listdir(tmp_path) == ["requests"]
