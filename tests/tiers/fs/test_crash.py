"""Writers that die, and several processes on one directory."""

import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstrata.tiers.base import JobResult
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.files.temporary import (
    FOREIGN_AGE_S,
    is_abandoned,
    is_temporary,
    sweep,
    temporary_name,
)
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.fs.tools.scan import check_root
from kvstrata.tiers.machine.liveness import process_state
from kvstrata.tiers.testing import CONTEXT, load, make_data, make_key, store
from tests.waiting import wait_until

SIZE = CONTEXT.layouts[0].nbytes
KEYS = [make_key(n) for n in range(64)]

# Stores the 64 pages over and over, each time from scratch. After the first time it says so,
# and what its I/O processes are.
WRITER = textwrap.dedent("""
    import os, shutil, sys
    from kvstrata.tiers.fs.tier import FsTier
    from kvstrata.tiers.testing import CONTEXT, make_data, make_key, store
    root, rounds = sys.argv[1], int(sys.argv[2])
    options = {"root_dir": root, "n_read_threads": 1, "n_write_threads": 4, "min_free_bytes": 0}
    if rounds > 1:
        options["durability"] = "fsync"  # most of the time is spent before the rename
    tier = FsTier(options, CONTEXT)
    size = CONTEXT.layouts[0].nbytes
    data = {make_key(n): make_data(n, size) for n in range(64)}
    for number in range(rounds):
        assert not store(tier, data).failed
        if number == 0:
            print(*tier.processes[0].pids(), flush=True)
        for key in data if rounds > 1 else ():
            os.unlink(tier.paths[0].page(key))
    assert tier.shutdown(60.0)
    assert not tier.stats().failures, tier.stats()
""")


def start_writer(root: Path, rounds: int) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A writer that has begun, and its I/O processes."""
    arguments = [sys.executable, "-c", WRITER, str(root), str(rounds)]
    writer = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    assert writer.stdout is not None
    pids = [int(word) for word in writer.stdout.readline().split()]
    assert len(pids) == 2
    return writer, pids


def is_alive(pid: int) -> bool:
    return process_state(pid)[0] not in ("", "Z", "X")


def temporaries(root: Path) -> list[str]:
    return [name for _, _, names in os.walk(root) for name in names if is_temporary(name)]


def check_pages(result: JobResult, arrived: dict[bytes, bytes]) -> None:
    assert set(result.failed.values()) <= {"missing"}
    assert all(arrived[key] == make_data(KEYS.index(key), SIZE) for key in arrived)


def test_killed_writers_leave_nothing_bad(
    root: Path, open_tier: Callable[..., FsTier], is_long: bool
) -> None:
    left_behind, least = 0, 100 if is_long else 4
    for attempt in range(200):
        if attempt >= least and left_behind:
            break
        writer, pids = start_writer(root, rounds=10**6)
        if attempt % 4 == 0:  # on a busy machine it may take long until something is written
            wait_until(lambda: temporaries(root))
        time.sleep(random.uniform(0.0, 0.05))
        if attempt % 4 == 3:  # what sleeps cannot see the engine go
            os.kill(pids[1], signal.SIGSTOP)
        if attempt % 2 == 0:  # as when the machine goes; else they end what they were given
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        wait_until(lambda pids=pids: not any(is_alive(pid) for pid in pids))
        left_behind += len(temporaries(root))
        report = check_root(str(root))
        assert report.bad == []
        if attempt % 4 == 2:
            tier = open_tier()
            check_pages(*load(tier, KEYS))
            wait_until(lambda: not temporaries(root))
            assert tier.shutdown(60.0)
    assert left_behind > 0, "no writer was killed while it wrote: the test saw nothing"


def test_two_processes_store_the_same_keys(root: Path, open_tier: Callable[..., FsTier]) -> None:
    for _ in range(2):
        writers = [start_writer(root, rounds=1) for _ in range(2)]
        assert [writer.wait(60.0) for writer, _ in writers] == [0, 0]
    result, arrived = load(open_tier(), KEYS)
    assert not result.failed
    check_pages(result, arrived)
    report = check_root(str(root))
    assert (report.files, report.bad, report.temporary) == (64, [], 0)


def test_two_tiers_store_the_same_keys(open_tier: Callable[..., FsTier]) -> None:
    tiers = [open_tier() for _ in range(3)]
    data = {key: make_data(n, SIZE) for n, key in enumerate(KEYS)}
    results: list[JobResult] = []
    threads = [
        threading.Thread(target=lambda t=tier: results.append(store(t, data))) for tier in tiers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [dict(result.failed) for result in results] == [{}] * 3
    check_pages(*load(open_tier(), KEYS))


def test_a_living_writer_keeps_its_temporaries(
    root: Path, paths: NamespacePaths, open_tier: Callable[..., FsTier]
) -> None:
    open_tier()
    ours = Path(paths.pages) / temporary_name()
    ours.write_bytes(b"x")
    os.utime(ours, (0, 0))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        start = process_state(other.pid)[1]
        match = re.match(r"(\.kvstrata-[0-9a-f]+)-", temporary_name())
        assert match
        living = f"{match[1]}-{other.pid}-{start}-{'0' * 16}.tmp"
        reused = f"{match[1]}-{other.pid}-{start + 1}-{'0' * 16}.tmp"
        assert not is_abandoned(living, FOREIGN_AGE_S + 1)
        assert is_abandoned(reused, 0.0)  # the pid went to another process
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert is_abandoned(living, 0.0)  # dead, even while its parent has not noticed
    assert is_abandoned(living, 0.0)
    assert sweep(paths.pages, threading.Event()) == 0
    assert ours.exists()


def test_foreign_temporaries_go_by_age() -> None:
    name = f".kvstrata-{'0' * 12}-1-1-{'0' * 16}.tmp"
    assert not is_abandoned(name, FOREIGN_AGE_S - 1)
    assert is_abandoned(name, FOREIGN_AGE_S + 1)


@pytest.mark.parametrize("name", ["notes.tmp", ".kvstrata-x.tmp", "page.safetensors", ""])
def test_only_our_names_are_swept(name: str) -> None:
    assert not is_temporary(name)
    assert not is_abandoned(name, 10 * FOREIGN_AGE_S)


def test_the_sweep_follows_no_link_and_stops(tmp_path: Path) -> None:
    dead = f".kvstrata-{'0' * 12}-1-1-{'0' * 16}.tmp"
    for place in ("outside", "inside/deep"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / dead).write_bytes(b"x")
        os.utime(tmp_path / place / dead, (0, 0))
    (tmp_path / "inside/link").symlink_to(tmp_path / "outside")
    stop = threading.Event()
    stop.set()
    assert sweep(str(tmp_path / "inside"), stop) == 0
    assert sweep(str(tmp_path / "inside"), threading.Event()) == 1
    assert (tmp_path / "outside" / dead).exists()
    assert not (tmp_path / "inside/deep" / dead).exists()


def test_names_differ() -> None:
    assert len({temporary_name() for _ in range(1000)}) == 1000
