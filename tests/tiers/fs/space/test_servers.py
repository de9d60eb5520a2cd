"""Several server processes on one root, under one budget that is far too small for them."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvstrata.tiers.fs.scan import check_root
from kvstrata.tiers.fs.space.limits import file_cost
from kvstrata.tiers.fs.space.space import Space
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.testing import CONTEXT, make_data, make_key, store

SIZE = CONTEXT.layouts[2].nbytes
BUDGET = 150 * file_cost(SIZE + 4096)

# Stores and loads random pages of three sizes and compares what it loads; prints what failed.
SERVER = textwrap.dedent("""
    import json, random, sys, time
    from collections import Counter
    from kvstrata.tiers.fs.tier import FsTier
    from kvstrata.tiers.testing import CONTEXT, load, make_data, make_key, store
    root, seed, seconds, budget = sys.argv[1], *map(int, sys.argv[2:])
    chance, causes, longest = random.Random(seed), Counter(), 0.0
    tier = FsTier(
        {"root_dir": root, "n_read_threads": 1, "n_write_threads": 2, "max_bytes": budget}, CONTEXT
    )
    print("ready", flush=True)
    end = time.monotonic() + seconds
    while (start := time.monotonic()) < end:
        group = chance.randrange(3)
        size = CONTEXT.layouts[group].nbytes
        numbers = chance.sample(range(150), 8)
        if chance.random() < 0.5:
            pages = {make_key(n, group): make_data(n, size) for n in numbers}
            causes.update(f"store: {c}" for c in store(tier, pages).failed.values())
            causes["stored"] += 1
        else:
            result, arrived = load(tier, [make_key(n, group) for n in numbers])
            causes.update(f"load: {c}" for c in result.failed.values())
            causes["loaded"] += len(arrived)
            for key, data in arrived.items():
                assert data == make_data(int.from_bytes(key[:8], "big"), size), "wrong bytes"
        longest = max(longest, time.monotonic() - start)
    assert tier.shutdown(30.0)
    print(json.dumps({**causes, "longest": longest}))
""")


def start(root: Path, seed: int, seconds: int) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-c", SERVER, str(root), str(seed), str(seconds), str(BUDGET)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return process


def used(disk: Path) -> int:
    """Bytes taken on the whole file system: exact at each moment, unlike a walk."""
    found = os.statvfs(disk)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def report(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    output, _ = process.communicate(timeout=60.0)
    assert process.returncode == 0
    return dict(json.loads(output))


def keeper(root: Path) -> bytes:
    from kvstrata.tiers.fs.space.ledger import Ledger

    ledger = Ledger(str(root / ".kvstrata/ledger"), 0o600, 0o700)
    with ledger.locked() as books:
        found = books.keeper
    ledger.close()
    return found


@pytest.mark.parametrize(("count", "seconds"), [(2, 4), (8, 5)])
def test_servers_stay_within_the_budget(
    disk: Callable[[str], Path], count: int, seconds: int
) -> None:
    place = disk("64m")
    root = place / "kv"
    servers = [start(root, seed, seconds) for seed in range(count)]
    most = 0
    while any(server.poll() is None for server in servers):
        most = max(most, used(place))
        time.sleep(0.001)
    assert BUDGET // 2 < most <= BUDGET
    for server in servers:
        found = report(server)
        assert found["stored"] > 0 and found["loaded"] > 0
        allowed = {"stored", "loaded", "longest", "load: missing", "load: checksum", "load: key"}
        assert set(found) <= allowed
    assert check_root(str(root)).bad == [] and check_root(str(root)).temporary == 0


def test_servers_that_are_killed_leave_the_budget_intact(disk: Callable[[str], Path]) -> None:
    place = disk("64m")
    root = place / "kv"
    servers = [start(root, seed, 60) for seed in range(3)]
    most = 0
    for round_ in range(6):
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            most = max(most, used(place))
            time.sleep(0.001)
        victim = servers[round_ % 3]
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        servers[round_ % 3] = start(root, 10 + round_, 60 if round_ < 5 else 3)
    for server in servers[:2]:
        server.kill()
        server.communicate()
    while servers[2].poll() is None:
        most = max(most, used(place))
        time.sleep(0.001)
    assert report(servers[2])["stored"] > 0
    assert most <= BUDGET
    assert check_root(str(root)).bad == []


def test_another_server_takes_over(root: Path, open_tier: Callable[..., FsTier]) -> None:
    first = start(root, 1, 60)
    holder = keeper(root)
    tier = open_tier(max_bytes=BUDGET)
    assert holder != bytes(16) and keeper(root) == holder
    first.kill()
    first.communicate()
    deadline = time.monotonic() + 30.0
    while keeper(root) == holder:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    space = tier._space
    assert space is not None and keeper(root) == space._server
    failed: dict[bytes, str] = {}
    for number in range(0, 400, 8):
        pages = {make_key(n, 2): make_data(n, SIZE) for n in range(number, number + 8)}
        failed.update(store(tier, pages).failed)
    assert failed == {}


def test_a_server_that_hangs_loses_the_lease(
    root: Path, open_tier: Callable[..., FsTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstrata.tiers.fs.space.presence.SILENT_S", 3.0)
    first = start(root, 1, 60)
    holder = keeper(root)
    # not while it has the ledger locked: a stopped process keeps its lock
    from kvstrata.tiers.fs.space.ledger import Ledger

    ledger = Ledger(str(root / ".kvstrata/ledger"), 0o600, 0o700)
    with ledger.locked():
        first.send_signal(signal.SIGSTOP)
    ledger.close()
    tier = open_tier(max_bytes=BUDGET)
    deadline = time.monotonic() + 30.0
    while keeper(root) == holder:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGCONT)
    time.sleep(0.5)
    space = tier._space
    assert isinstance(space, Space) and keeper(root) == space._server
    first.kill()
    first.communicate()
