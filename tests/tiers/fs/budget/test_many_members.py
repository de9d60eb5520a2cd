"""Several server processes on one root, under one budget that is far too small for them."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvstrata.tiers.fs.budget.ledger import Books, Ledger
from kvstrata.tiers.fs.budget.limits import file_cost
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.fs.tools.scan import check_root
from kvstrata.tiers.testing import CONTEXT, load, make_data, make_key, store
from tests.sessions import kill_session
from tests.tiers.fs.budget.conftest import OpenServer
from tests.tiers.fs.budget.harness import disk_usage, rest
from tests.waiting import wait_until

REPOSITORY = Path(__file__).parents[4]
PATIENT = Path(__file__).with_name("patient_worker.py")
SIZE = CONTEXT.layouts[2].nbytes
BUDGET = 150 * file_cost(SIZE + 4096)

# Stores and loads random pages of three sizes and compares what it loads; prints what failed.
SERVER = textwrap.dedent("""
    import json, os, random, sys
    from collections import Counter
    from kvstrata.tiers.fs.tier import FsTier
    from kvstrata.tiers.process import process
    from kvstrata.tiers.testing import CONTEXT, load, make_data, make_key, store
    root, seed, steps, budget = sys.argv[1], *map(int, sys.argv[2:5])
    if worker := sys.argv[5:]:
        process.COMMAND = (sys.executable, "-P", *worker)
    chance, causes = random.Random(seed), Counter()
    tier = FsTier(
        {"root_dir": root, "n_read_threads": 1, "n_write_threads": 2, "max_bytes": budget,
         "min_free_bytes": 0}, CONTEXT
    )
    print("ready", flush=True)
    parent = os.getppid()
    for _ in range(steps):
        if os.getppid() != parent:
            sys.exit("the test is over")
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
    assert tier.shutdown(30.0)
    print(json.dumps(causes))
""")


# One server without I/O processes, so that it can be stopped; stores for ever.
LONER = textwrap.dedent("""
    import os, sys, time
    from pathlib import Path
    from tests.tiers.fs.budget.harness import Server
    server = Server(Path(sys.argv[1]), max_bytes=int(sys.argv[2]))
    print("ready", flush=True)
    number, parent = 0, os.getppid()
    while os.getppid() == parent:
        number += 1
        server.put([number % 400])
        time.sleep(0.001)
""")


def start(root: Path, seed: int, steps: int = 10**9, *worker: Path) -> subprocess.Popen[bytes]:
    return launch(SERVER, root, seed, steps, BUDGET, *worker)


def launch(script: str, *arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, cwd=REPOSITORY, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return process


def kill(process: subprocess.Popen[bytes]) -> None:
    kill_session(process.pid)
    process.communicate()


@contextmanager
def most_used(disk: Path) -> Iterator[list[int]]:
    """The most bytes taken on the whole file system: exact at each moment, unlike a walk."""
    over, most = threading.Event(), [0]

    def look() -> None:
        while not over.wait(0.001):
            found = os.statvfs(disk)
            most[0] = max(most[0], (found.f_blocks - found.f_bfree) * found.f_frsize)

    looker = threading.Thread(target=look)
    looker.start()
    try:
        yield most
    finally:
        over.set()
        looker.join()


def report(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    output, _ = process.communicate(timeout=1200.0)
    assert process.returncode == 0
    return dict(json.loads(output))


def books(root: Path) -> Books:
    ledger = Ledger(str(root), 0o600, 0o700)
    with ledger.locked() as found:
        pass
    ledger.close()
    return found


@pytest.mark.parametrize(("count", "steps"), [(2, 60), (5, 24)])
def test_servers_stay_within_the_budget(
    disk: Callable[[str], Path], count: int, steps: int, is_long: bool
) -> None:
    steps *= 60 if is_long else 1  # minutes instead of seconds
    place = disk("64m")
    root = place / "kv"
    with most_used(place) as most:
        servers = [start(root, seed, steps, PATIENT) for seed in range(count)]
        found = [report(server) for server in servers]
    assert BUDGET // 2 < most[0] <= BUDGET
    allowed = {"stored", "loaded", "load: missing", "load: checksum", "load: key", "store: budget"}
    for each in found:
        assert each["stored"] > 0 and each["loaded"] > 0
        # on a busy machine room may come too late, but for few of the 8 pages of a store
        assert each.get("store: budget", 0) <= 2 * each["stored"]
        assert set(each) <= allowed
    assert check_root(str(root)).bad == [] and check_root(str(root)).temporary == 0


def test_servers_that_are_killed_leave_the_budget_intact(
    disk: Callable[[str], Path], is_long: bool
) -> None:
    rounds = 41 if is_long else 3
    place = disk("64m")
    root = place / "kv"
    with most_used(place) as most:
        servers = [start(root, seed) for seed in range(2)]
        for round_ in range(rounds):
            time.sleep(random.uniform(0.1, 0.5))
            kill(servers[round_ % 2])
            servers[round_ % 2] = start(root, 10 + round_, 10**9 if round_ < rounds - 1 else 40)
        kill(servers[1])
        assert report(servers[0])["stored"] > 0
    assert BUDGET // 2 < most[0] <= BUDGET
    assert check_root(str(root)).bad == [] and check_root(str(root)).temporary == 0
    assert not list((root / ".kvstrata").glob("*.tmp"))


@pytest.mark.parametrize("victim", [0, 1])  # readers, writers
def test_an_io_process_that_is_killed(
    disk: Callable[[str], Path],
    open_tier: Callable[..., FsTier],
    monkeypatch: pytest.MonkeyPatch,
    victim: int,
) -> None:
    monkeypatch.setattr("kvstrata.tiers.process.supervisor.RESTART_S", 0.01)
    place = disk("64m")
    root = place / "kv"
    pages = {make_key(n, 2): make_data(n, SIZE) for n in range(600)}
    with most_used(place) as most:
        tiers = [open_tier(root_dir=str(root), max_bytes=BUDGET) for _ in range(2)]
        for start_ in range(0, 600, 20):
            some = dict(list(pages.items())[start_ : start_ + 20])
            if start_ % 200 == 100:
                os.kill(tiers[0].processes[0].pids()[victim], signal.SIGKILL)
            for tier in tiers:
                failed = store(tier, some).failed
                assert set(failed.values()) <= ({"crashed"} if tier is tiers[0] else set())
        _, arrived = load(tiers[1], list(pages)[-20:])
        assert all(data == pages[key] for key, data in arrived.items()) and len(arrived) > 0

        def settled() -> bool:
            for tier in tiers:
                tier.get_finished()  # this is what starts the processes again
            rows = books(root).rows.values()  # of the dead none is left
            return len(rows) == 4 and not any(row.reserved_files for row in rows)

        wait_until(settled)
    assert tiers[0].stats().counters["restarted_processes"] > 0
    assert BUDGET // 2 < most[0] <= BUDGET
    assert check_root(str(root)).bad == []


def test_another_server_takes_over(root: Path, open_server: OpenServer) -> None:
    first = start(root, 1)
    wait_until(lambda: books(root).known)
    holder = books(root).keeper
    server = open_server(max_bytes=BUDGET)
    assert holder in books(root).rows and books(root).keeper == holder
    kill(first)
    wait_until(server.keeps)
    assert server.put(range(400)) == {}
    rest(server)
    assert books(root).rows.keys() == {server.id}
    assert disk_usage(root)[0] <= BUDGET


def test_a_server_that_hangs_loses_the_lease_and_comes_back(
    root: Path, open_server: OpenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstrata.tiers.fs.budget.lease.SILENT_S", 0.5)
    first = launch(LONER, root, BUDGET)
    wait_until(lambda: books(root).known)
    holder = books(root).keeper
    ledger = Ledger(str(root), 0o600, 0o700)
    with ledger.locked():  # not while it has that itself: a stopped process keeps its lock
        first.send_signal(signal.SIGSTOP)
    ledger.close()
    server = open_server(max_bytes=BUDGET)
    wait_until(server.keeps)
    wait_until(lambda: books(root).rows.keys() == {server.id})
    assert server.put(range(1000, 1100)) == {}
    monkeypatch.setattr("kvstrata.tiers.fs.budget.lease.SILENT_S", 60.0)
    first.send_signal(signal.SIGCONT)
    wait_until(lambda: holder in books(root).rows)
    assert server.keeps()
    assert (root / f".kvstrata/{holder.hex()}.server").exists()
    for start_ in range(2000, 2400, 20):
        server.put(range(start_, start_ + 20))
        assert disk_usage(root)[0] <= BUDGET
    assert not books(root).rows[holder].dead
    kill(first)
    rest(server)
