"""Order of use between servers: two I/O processes of an engine, and two engines."""

from pathlib import Path

import pytest

from kvstrata.tiers.fs.budget import member as member_module
from kvstrata.tiers.fs.budget.keeper import replay as replay_module
from tests.tiers.fs.budget.conftest import OpenServer
from tests.tiers.fs.budget.harness import BUDGET, COST, Server, are_the_last, rest, rest_driven


def put_many(server: Server, numbers: range) -> None:
    """Store more than the budget holds, and let the keeper evict."""
    missing: list[int] = list(numbers)
    while missing:
        missing = list(server.put(missing))
        rest_driven(server)


@pytest.mark.parametrize("attempt", range(4))  # the ids, and so the order of reading, are random
def test_a_use_that_is_noted_before_the_store(open_driven: OpenServer, attempt: int) -> None:
    writers = open_driven(max_bytes=BUDGET, engine=7)
    readers = open_driven(max_bytes=BUDGET, engine=7, keeps=False)
    rest_driven(writers, readers)
    writers.put(range(80))
    readers._access = writers._access
    readers.get(range(10))
    readers.turn()  # the writers' journal comes later
    readers.leave()
    writers.turn()
    writers.leave()
    writers = open_driven(max_bytes=BUDGET // 2)
    rest_driven(writers)
    left = writers.there(range(80))
    assert 30 < len(left) < 50 and set(range(10)) <= left
    assert are_the_last(left - set(range(10)), range(80))
    writers.die()


def test_a_use_that_is_noted_after_the_keeper_left(open_driven: OpenServer) -> None:
    writers = open_driven(max_bytes=BUDGET, engine=7)
    readers = open_driven(max_bytes=BUDGET, engine=7, keeps=False)
    rest_driven(writers, readers)
    writers.put(range(80))
    readers._access = writers._access
    readers.get(range(10))
    writers.leave()
    readers.leave()
    writers = open_driven(max_bytes=BUDGET // 2)
    rest_driven(writers)
    assert writers.there(range(10)) == set(range(10))
    writers.die()


def test_one_access_of_two_servers_ends_deepest_first(open_driven: OpenServer) -> None:
    first = open_driven(max_bytes=BUDGET, engine=7)
    second = open_driven(max_bytes=BUDGET, engine=7, keeps=False)
    rest_driven(first, second)
    access = first.access()
    first.put(range(0, 40, 2), access=access)
    first.turn()
    first.put(range(200, 210))  # a later access arrives before the rest of the first
    first.turn()
    second.put(range(1, 40, 2), access=access)
    rest_driven(first, second)
    put_many(first, range(100, 170))
    left = first.there(range(40))
    assert left and left == set(range(len(left))) != set(range(40))
    assert first.there(range(200, 210)) == set(range(200, 210))
    first.die()
    second.die()


def test_two_engines_interleaved(open_server: OpenServer) -> None:
    servers = [open_server(max_bytes=BUDGET) for _ in range(2)]
    rest(*servers)
    accesses = [server.access() for server in servers]
    for step in range(0, 20, 4):
        for server, access, base in zip(servers, accesses, (0, 20), strict=True):
            server.put(range(base + step, base + step + 4), access=access)
    rest(*servers)
    servers[0].put(range(100, 172))
    rest(*servers)
    for base in (0, 20):  # what is left of each prefix is its beginning
        left = servers[0].there(range(base, base + 20))
        assert left == set(range(base, base + len(left)))
    assert len(servers[0].there(range(40))) < 40


def test_a_promise_of_another_server_spares(
    open_server: OpenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (replay_module, member_module):
        monkeypatch.setattr(module, "PROTECT_S", 60.0)
    keeper = open_server(max_bytes=20 * COST)
    keeper.put(range(8))
    rest(keeper)
    other = open_server(max_bytes=20 * COST)
    other.promise(range(4))
    rest(keeper, other)
    assert keeper.keeps()
    keeper.put(range(100, 200))
    assert keeper.there(range(8)) == set(range(4))
    assert other.get(range(4)) == set(range(4))
    rest(keeper, other)
    keeper.put(range(200, 300))
    assert keeper.there(range(8)) == set()


def test_uses_are_known_before_a_scan_has_found_the_files(
    root: Path, open_driven: OpenServer
) -> None:
    server = open_driven(max_bytes=BUDGET)
    rest_driven(server)
    server.put(range(80))
    rest_driven(server)
    server.die()
    for path in (root / ".kvstrata").iterdir():
        if path.is_file():
            path.unlink()
    server = open_driven(max_bytes=BUDGET // 2)
    server.use(range(10))
    rest_driven(server)
    left = server.there(range(80))
    assert len(left) < 50 and set(range(10)) <= left
    server.die()
