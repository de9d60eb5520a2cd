"""`kvstrata pool`: what it lists, what it removes, and what it does not."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstrata.tiers.pool.place import make_pool
from kvstrata.tiers.pool.tier import PoolTier
from kvstrata.tiers.testing import CONTEXT, make_data, make_key, store
from tests.offload.cli.cli_world import outcome, run, run_json
from tests.tiers.pool.pool_world import make_tier, own_shm, pool_dir
from tests.waiting import wait_until

PAGES = {make_key(n): make_data(n, CONTEXT.layouts[0].nbytes) for n in range(8)}


@pytest.fixture(autouse=True)
def shm() -> Iterator[Path]:
    with own_shm() as folder:
        yield folder


@pytest.fixture
def server() -> Iterator[PoolTier]:
    """A server that lives on the pool `node`, with 8 pages in it."""
    tier = make_tier()
    assert not store(tier, PAGES).failed
    # its I/O processes, of which one may have stored before the other was there
    wait_until(lambda: run_json("pool", "ls")["pools"][0]["servers"] == 2)
    yield tier
    assert tier.shutdown(60.0)


def test_ls_beside_a_server(server: PoolTier, shm: Path) -> None:
    wait_until(lambda: run_json("pool", "ls")["pools"][0]["files"] > 8)  # the books are among them
    (found,) = run_json("pool", "ls")["pools"]
    assert 0 <= found.pop("used_age_s") < 600
    assert found.pop("bytes") > 8 * 4096 and found.pop("files") < 40
    pids = sorted(server.processes[0].pids())
    assert found == {
        "name": "node",
        "path": str(pool_dir(shm)),
        "wrong": None,
        "counted": True,
        "max_bytes": 2**26,
        "servers": 2,
        "pids": pids,
    }
    shown = run("pool", "ls")
    assert shown.startswith("node: ") and " of at most 64.0 MiB; 2 members (processes " in shown
    assert f"{pids[0]}, {pids[1]}), used " in shown


def test_ls_after_the_servers(server: PoolTier) -> None:
    assert server.shutdown(60.0)
    (found,) = run_json("pool", "ls")["pools"]
    assert found["files"] > 8 and found["used_age_s"] < 600
    assert (found["servers"], found["pids"], found["max_bytes"]) == (0, [], None)
    assert "; 0 members, used " in run("pool", "ls")


def test_ls_without_books(shm: Path) -> None:
    make_pool("b")
    make_pool("a")
    (shm / "kvstrata-pool-1-another").mkdir()  # of another user
    (shm / f"kvstrata_{os.geteuid()}_engine").touch()  # a region
    assert [each["name"] for each in run_json("pool", "ls")["pools"]] == ["a", "b"]
    (Path(make_pool("b")) / "mine").touch()
    shown = run("pool", "ls").splitlines()
    assert shown[0] == f"a: '{pool_dir(shm, 'a')}' is empty"
    assert shown[1] == f"b: '{pool_dir(shm, 'b')}' has no books that can be read"


def test_ls_of_what_is_no_pool(shm: Path, tmp_path: Path) -> None:
    pool_dir(shm, "a").symlink_to(tmp_path)
    pool_dir(shm, "b").touch()
    make_pool("c")
    pool_dir(shm, "c").chmod(0o777)
    shown = run("pool", "ls").splitlines()
    whys = ("is a symbolic link", "is not a directory", "has mode 0777")
    for name, why, line in zip("abc", whys, shown, strict=True):
        assert line.startswith(f"{name}: '{pool_dir(shm, name)}' {why}")
    (link, *_) = run_json("pool", "ls")["pools"]
    assert link["wrong"].startswith("is a symbolic link") and link["files"] is None


def test_no_pools() -> None:
    assert run_json("pool", "ls") == {"pools": []}
    said = f"kvstrata: user {os.geteuid()} has no pools\n"
    assert outcome("pool", "ls") == (0, "", said)


def test_no_shared_memory(shm: Path) -> None:
    shm.rmdir()
    assert run("pool", "ls", exit_code=2) == f"kvstrata: '{shm}': No such file or directory\n"
    shm.mkdir()


def test_rm(server: PoolTier, shm: Path) -> None:
    neighbours = [Path(make_pool("other")), Path(make_pool("node2")), shm / "foreign"]
    neighbours[2].touch()
    assert server.shutdown(60.0)
    assert run("pool", "rm", "node") == "pool node is removed\n"
    assert sorted(shm.iterdir()) == sorted(neighbours)
    assert "No such file" in run("pool", "rm", "node", exit_code=2)


def test_rm_beside_a_server(server: PoolTier, shm: Path) -> None:
    before = sorted(path.name for path in pool_dir(shm).rglob("*.safetensors"))
    said = run("pool", "rm", "node", exit_code=2)
    pids = sorted(server.processes[0].pids())
    assert said == (
        "kvstrata: pool 'node' is in use: 2 I/O processes of servers live on it "
        f"(processes {pids[0]}, {pids[1]}); stop the servers first\n"
    )
    assert sorted(path.name for path in pool_dir(shm).rglob("*.safetensors")) == before != []


def test_rm_where_the_kernel_names_no_process(
    server: PoolTier, shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of those in another container."""
    monkeypatch.setattr("kvstrata.tiers.pool.tools._LOCKS", str(shm / "absent"))
    said = run("pool", "rm", "node", exit_code=2)
    assert "2 I/O processes of servers live on it, also of other containers; stop" in said
    assert run_json("pool", "ls")["pools"][0]["pids"] == []


def test_rm_follows_no_link(shm: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    pool_dir(shm).symlink_to(tmp_path)
    said = run("pool", "rm", "node", exit_code=2)
    assert "is a symbolic link" in said and (tmp_path / "precious").exists()
    inside = Path(make_pool("other")) / f"model_{'0' * 12}"
    inside.mkdir()
    (inside / "link").symlink_to(tmp_path)
    run("pool", "rm", "other")
    assert (tmp_path / "precious").exists() and not inside.exists()


def test_rm_of_what_is_no_pool(shm: Path) -> None:
    path = Path(make_pool("node"))
    (path / "mine").touch()
    said = run("pool", "rm", "node", exit_code=2)
    assert said.endswith("holds 'mine', which no server put there: move it away\n")
    assert (path / "mine").exists()


@pytest.mark.parametrize("name", ["../x", "", ".", "a/b", "a\nb"])
def test_names_that_are_none(name: str) -> None:
    assert "is wrong; give a plain file name" in run("pool", "rm", name, exit_code=2)
