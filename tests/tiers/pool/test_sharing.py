"""What the replicas of a node store in their pool is there for all of them, and stays."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from kvstrata.tiers.base import Lookup
from kvstrata.tiers.fs.tools.repair import examine
from kvstrata.tiers.pool.tier import PoolTier
from kvstrata.tiers.testing import CONTEXT, find, load, make_data, make_key, settle, store
from tests.tiers.pool.pool_world import pool_dir

OpenTier = Callable[..., PoolTier]

PAGES = {make_key(n): make_data(n, CONTEXT.layouts[0].nbytes) for n in range(40)}
THEIRS = {make_key(n): make_data(n, CONTEXT.layouts[0].nbytes) for n in range(100, 140)}

# Another replica, with a region of its own: stores 40 pages, says what it is, and lives on.
REPLICA = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from kvstrata.tiers.pool import place
    from kvstrata.tiers.pool.tier import PoolTier
    from kvstrata.tiers.testing import CONTEXT, make_data, make_key, store
    place.SHM = Path(sys.argv[1])
    few = {"n_read_threads": 2, "n_write_threads": 2}
    tier = PoolTier({"name": "node", "max_bytes": "64MiB", **few}, CONTEXT)
    size = CONTEXT.layouts[0].nbytes
    assert not store(tier, {make_key(n): make_data(n, size) for n in range(100, 140)}).failed
    print(*tier.processes[0].pids(), flush=True)
    time.sleep(600)
""")


class Replica:
    """A process with a tier; see `REPLICA`."""

    def __init__(self, shm: Path) -> None:
        command = [sys.executable, "-c", REPLICA, str(shm)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._io = [int(word) for word in self._process.stdout.readline().split()]
        assert len(self._io) == 2

    def kill(self) -> None:
        """With its I/O processes, at once."""
        if self._process.poll() is None:
            for pid in (self._process.pid, *self._io):
                os.kill(pid, signal.SIGKILL)
            self._process.communicate()


@pytest.fixture
def replica(shm: Path) -> Iterator[Replica]:
    started = Replica(shm)
    yield started
    started.kill()


def test_what_one_stores_the_others_have(open_tier: OpenTier, replica: Replica) -> None:
    tier, third = open_tier(), open_tier()
    assert not store(tier, PAGES).failed
    for key in [*PAGES, *THEIRS]:
        find(third, key)
    assert load(third, list(PAGES))[1] == PAGES
    assert load(third, list(THEIRS))[1] == THEIRS
    assert third.stats().failures == {} == tier.stats().failures


def test_one_that_starts_knows_all_at_once(open_tier: OpenTier, replica: Replica) -> None:
    tier = open_tier()
    assert {settle(tier, key) for key in THEIRS} == {Lookup.HIT}


def test_a_killed_replica_costs_the_others_nothing(
    open_tier: OpenTier, replica: Replica, shm: Path
) -> None:
    tier = open_tier()
    assert not store(tier, PAGES).failed
    replica.kill()
    assert load(tier, list(THEIRS))[1] == THEIRS
    more = {make_key(n): make_data(n, CONTEXT.layouts[0].nbytes) for n in range(200, 240)}
    assert not store(tier, more).failed
    assert load(tier, [*PAGES, *more])[1] == PAGES | more
    assert tier.stats().failures == {}
    assert tier.shutdown(60.0)
    assert [
        each for each in examine(str(pool_dir(shm)), fix=False).findings if not each.remains
    ] == []


def test_the_pool_outlives_its_servers(open_tier: OpenTier, replica: Replica) -> None:
    tier = open_tier()
    assert not store(tier, PAGES).failed
    replica.kill()
    assert tier.shutdown(60.0)
    tier = open_tier()
    assert {settle(tier, key) for key in [*PAGES, *THEIRS]} == {Lookup.HIT}
    assert load(tier, [*PAGES, *THEIRS])[1] == PAGES | THEIRS


def test_the_budget_bounds_all_together(open_tier: OpenTier, shm: Path) -> None:
    tiers = [open_tier(max_bytes="1MiB"), open_tier(max_bytes="1MiB")]
    size = CONTEXT.layouts[2].nbytes
    for number in range(0, 300, 10):
        for which, tier in enumerate(tiers):
            keys = [make_key(2 * n + which, 2) for n in range(number, number + 10)]
            failed = store(tier, {key: make_data(0, size) for key in keys}).failed
            assert set(failed.values()) <= {"budget"}  # eviction is a moment behind
            assert taken(pool_dir(shm)) <= 2**20
    for tier in tiers:
        counters = tier.stats().counters
        assert counters["stored_pages"] > 20
    assert sum(tier.stats().counters["evicted_pages"] for tier in tiers) > 100


def taken(path: Path) -> int:
    """Bytes of the files below it; some may go meanwhile."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(folder, name)).st_blocks * 512
    return total
