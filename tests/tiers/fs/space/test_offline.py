"""Trimming from outside, and recency for reports."""

import time
from pathlib import Path

import pytest

from kvstrata.tiers.fs.scan import check_root
from kvstrata.tiers.fs.space import offline
from kvstrata.tiers.fs.space.limits import Limits
from kvstrata.tiers.fs.space.offline import last_uses, trim
from tests.tiers.fs.space.conftest import OpenServer
from tests.tiers.fs.space.harness import COST, rest

PAGES = range(60)


def test_trim_while_no_server_runs(root: Path, open_server: OpenServer) -> None:
    server = open_server()
    server.put(PAGES)
    server.close()
    seen: list[tuple[int, int]] = []
    found = trim(str(root), Limits(max_bytes=40 * COST), lambda *now: seen.append(now))
    assert found.within and 20 <= found.evicted_files < 30 and found.failures == {}
    assert found.evicted_bytes == found.evicted_files * COST
    assert seen[-1] == (seen[-1][0], found.evicted_files) and seen[-1][0] <= 40 * COST
    assert check_root(str(root)).files == 60 - found.evicted_files
    again = trim(str(root), Limits(max_bytes=40 * COST))
    assert again.within and again.evicted_files == 0


def test_trim_beside_a_server(root: Path, open_server: OpenServer) -> None:
    server = open_server(max_bytes="1GiB")
    server.put(PAGES)
    rest(server)
    found = trim(str(root), Limits(max_files=30))
    assert found.within and found.evicted_files == 0
    assert server.done["evicted_files"] >= 30
    assert len(server.get(PAGES)) < 30
    assert server.failures.keys() == {"missing"}
    assert server.put(PAGES) == {}  # the limit ended with the trimming
    assert server.get(PAGES) == set(PAGES)


def test_trim_that_cannot_succeed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "_STUCK_S", 0.2)
    root.mkdir()
    (root / "foreign").write_bytes(bytes(10**5))
    assert not trim(str(root), Limits(max_bytes=10**4)).within
    assert (root / "foreign").exists()


def test_trim_needs_a_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        trim(str(tmp_path / "none"), Limits(max_bytes=1))


def test_last_uses(root: Path, open_server: OpenServer) -> None:
    assert last_uses(str(root)) == {}
    before = time.time()
    server = open_server(max_bytes="1GiB")
    server.put(PAGES)
    server.close()
    found = last_uses(str(root))
    assert list(found) == [server.paths.name]
    assert before - 1 <= next(iter(found.values())) <= time.time() + 1
