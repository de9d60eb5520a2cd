"""`kvstrata copy` from and to pools: none takes more than it may."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata.offload.cli.copy import pool as pool_place
from kvstrata.tiers.pool.place import make_pool
from kvstrata.tiers.testing import CONTEXT, make_data, make_key
from tests.conftest import FillRoot
from tests.offload.cli.cli_world import run, run_json
from tests.tiers.pool.pool_world import make_tier, own_shm, pool_dir

SIZE = CONTEXT.layouts[0].nbytes
MANY = {make_key(n): make_data(n, SIZE) for n in range(200)}
MOST = 2**20


@pytest.fixture(autouse=True)
def shm() -> Iterator[Path]:
    with own_shm() as folder:
        yield folder


@pytest.fixture
def full(root: Path, fill_root: FillRoot) -> Path:
    """A root with more pages than `MOST` bytes hold."""
    fill_root(root, MANY)
    return root


def taken(path: Path) -> int:
    """Bytes of memory."""
    return sum(found.lstat().st_blocks * 512 for found in path.rglob("*"))


def entry(max_bytes: int | str = MOST) -> str:
    return json.dumps({"type": "pool", "name": "node", "max_bytes": max_bytes})


def test_a_pool_takes_no_more_than_it_may(full: Path, shm: Path, tmp_path: Path) -> None:
    done = run_json("copy", full, entry(), exit_code=1)
    assert 0 < done["pages"] < len(MANY) and "has no more room" in done["stopped"]
    assert MOST / 2 < taken(pool_dir(shm)) <= MOST
    assert run_json("copy", full, entry(), exit_code=1)["there"] == done["pages"]
    assert taken(pool_dir(shm)) <= MOST
    said = run("copy", full, entry(), exit_code=1).splitlines()[-1]
    assert "; free some of the pool (kvstrata gc), or give TO as a tier of type pool" in said
    assert run_json("copy", entry(), tmp_path / "back")["pages"] == done["pages"]
    assert run_json("copy", full, entry("64MiB"))["pages"] == len(MANY) - done["pages"]


def test_a_path_without_a_server_takes_what_is_left(
    full: Path, shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_place, "most_bytes", lambda path: MOST)
    path = make_pool("node")
    assert 0 < run_json("copy", full, path, exit_code=1)["pages"] < len(MANY)
    assert MOST / 2 < taken(pool_dir(shm)) <= MOST


def test_a_path_with_a_server_takes_what_the_server_says(
    full: Path, shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which evicts for the copy as for others."""
    monkeypatch.setattr(pool_place, "most_bytes", lambda path: MOST)
    tier = make_tier(max_bytes="2MiB")
    assert run_json("copy", full, pool_dir(shm))["pages"] == len(MANY)
    assert tier.shutdown(60.0)  # files that are evicted cannot be measured
    assert taken(pool_dir(shm)) <= 2 * 2**20


def test_what_is_no_pool(full: Path, shm: Path, tmp_path: Path) -> None:
    assert "do not fit" in run("copy", full, entry("900TiB"), exit_code=2)
    pool_dir(shm).rmdir()
    pool_dir(shm).symlink_to(tmp_path)
    for ends in ((full, entry()), (entry(), tmp_path / "back")):
        assert "is a symbolic link" in run("copy", *ends, exit_code=2)
