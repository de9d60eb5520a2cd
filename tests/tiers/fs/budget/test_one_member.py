"""One server under a budget."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstrata.tiers.base import TierContext
from kvstrata.tiers.fs.budget import admission as admission_module
from kvstrata.tiers.fs.budget import member as member_module
from kvstrata.tiers.fs.budget.keeper import replay as replay_module
from kvstrata.tiers.fs.budget.limits import Limits
from kvstrata.tiers.fs.tools.scan import check_root
from kvstrata.tiers.testing import CONTEXT, make_key
from tests.spoiling import flip
from tests.tiers.fs.budget.conftest import OpenServer
from tests.tiers.fs.budget.harness import (
    BUDGET,
    COST,
    GROUP,
    are_the_last,
    disk_usage,
    rest,
    rest_driven,
)


def test_the_budget_holds(root: Path, open_server: OpenServer) -> None:
    server = open_server(max_bytes=BUDGET)
    for start in range(0, 400, 20):
        assert server.put(range(start, start + 20)) == {}
        assert disk_usage(root)[0] <= BUDGET
    rest(server)
    there = server.there(range(400))
    assert len(there) > 70 and are_the_last(there, range(400))
    assert server.get(range(380, 400)) == set(range(380, 400))
    assert server.done["evicted_pages"] >= 300 and not server.failures
    assert server.done["evicted_bytes"] == server.done["evicted_pages"] * COST
    report = check_root(str(root))
    assert (report.bad, report.temporary) == ([], 0)
    # directories that became empty are gone
    assert all(names or inner for _, inner, names in os.walk(server.paths.pages))


def test_victims_are_recycled(root: Path, open_server: OpenServer) -> None:
    server = open_server(max_bytes=BUDGET)
    server.put(range(100))
    rest(server)
    spare = {entry.inode() for entry in os.scandir(root / ".kvstrata/spare")}
    assert spare
    new = range(100, 100 + len(spare))
    server.put(new)
    rest(server)
    page = server.paths.page
    assert spare & {os.stat(page(make_key(n, GROUP))).st_ino for n in new}
    assert check_root(str(root)).bad == []


def test_least_recently_used_goes_first(open_server: OpenServer) -> None:
    server = open_server(max_bytes=BUDGET)
    server.put(range(80))
    assert server.get(range(10)) == set(range(10))
    server.use(range(10, 20))
    server.promise(range(20, 30))
    server.put(range(30, 40))  # they are there already
    rest(server)
    server.put(range(100, 140))
    rest(server)
    left = server.there(range(80))
    assert set(range(40)) <= left and are_the_last(left - set(range(40)), range(80))
    assert not server.there(range(40, 60))


def test_the_deepest_page_of_a_prefix_goes_first(open_server: OpenServer) -> None:
    server = open_server(max_bytes=BUDGET)
    assert server.put(range(40), access=server.access()) == {}
    rest(server)
    server.put(range(100, 180))
    rest(server)
    left = server.there(range(40))
    assert left and left == set(range(len(left))) != set(range(40))


def test_use_survives_a_restart(open_server: OpenServer) -> None:
    server = open_server(max_bytes=BUDGET)
    server.put(range(80))
    server.get(range(10))
    server.close()
    for n in range(10):
        os.utime(server.paths.page(make_key(n, GROUP)), (0, 0))  # file times are not believed
    server = open_server(max_bytes=BUDGET // 2)  # and a smaller budget trims
    rest(server)
    left = server.there(range(80))
    assert 30 < len(left) < 50 and set(range(10)) <= left
    assert are_the_last(left - set(range(10)), range(80))


def test_a_directory_over_budget_is_trimmed_by_age(root: Path, open_server: OpenServer) -> None:
    server = open_server(max_bytes="1GiB")
    server.put(range(150))
    server.close()
    for path in [p for p in (root / ".kvstrata").iterdir() if p.is_file()]:
        path.unlink()
    for n in range(150):
        os.utime(server.paths.page(make_key(n, GROUP)), (0, 1000 + (n * 7) % 150))
    server = open_server(max_bytes=BUDGET)
    rest(server)
    assert disk_usage(root)[0] <= BUDGET
    left = server.there(range(150))
    newest = sorted(range(150), key=lambda n: (n * 7) % 150)[-len(left) :]
    assert len(left) > 80 and left == set(newest)
    assert server.put(range(200, 210)) == {}


def test_max_files(root: Path, open_server: OpenServer) -> None:
    server = open_server(max_files=60)
    for start in range(0, 200, 20):
        assert server.put(range(start, start + 20)) == {}
        assert disk_usage(root)[1] <= 60
    rest(server)
    assert server.there(range(160, 200)) == set(range(160, 200))


@pytest.mark.parametrize("least", [600_000, "30%"])
def test_min_free_bytes(
    disk: Callable[[str], Path], open_server: OpenServer, least: int | str
) -> None:
    place = disk("2m")
    server = open_server(at=place / "kv", min_free_bytes=least)
    for start in range(0, 200, 20):
        assert server.put(range(start, start + 20)) == {}
        found = os.statvfs(place)
        assert found.f_bavail * found.f_frsize >= 600_000
    rest(server)
    assert server.get(range(180, 200)) == set(range(180, 200))
    (place / "else").write_bytes(bytes(500_000))  # somebody else takes space
    rest(server)
    server.put(range(300, 304))
    rest(server)
    found = os.statvfs(place)
    assert found.f_bavail * found.f_frsize >= 600_000


def test_a_full_disk_evicts(disk: Callable[[str], Path], open_server: OpenServer) -> None:
    place = disk("1m")
    server = open_server(at=place / "kv", max_bytes="1GiB")
    for start in range(0, 110, 10):
        assert server.put(range(start, start + 10)) == {}
    rest(server)
    assert server.done["evicted_pages"] > 20
    assert check_root(str(place / "kv")).bad == []
    assert server.get(range(90, 110)) == set(range(90, 110))


@pytest.mark.parametrize(("least", "full"), [(0, 0.9), ("10%", 0.8)])
def test_a_disk_that_is_just_full_loses_no_more_than_it_gets(
    disk: Callable[[str], Path], open_server: OpenServer, least: int | str, full: float
) -> None:
    """No store fails, and what is stored takes the place of as much."""
    place = disk("4m")
    server = open_server(at=place / "kv", min_free_bytes=least)
    fewest, number, most = None, 0, 0
    while number < 3 * 4 * 2**20 // COST:
        assert server.put(range(number, number + 20)) == {}
        number += 20
        assert server.get(range(number - 20, number)) == set(range(number - 20, number))
        there = len(server.there(range(number)))
        most = max(most, there)
        if server.done["evicted_pages"]:
            fewest = min(there, fewest or there)
    rest(server)
    assert fewest is not None and fewest > 0.8 * most and most * COST > full * 4 * 2**20
    assert are_the_last(server.there(range(number)), range(number))
    assert server.failures.keys() <= {"books"}  # they need room too, now and then


def test_a_disk_that_takes_nothing_does_not_empty_the_tier(
    open_server: OpenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a quota: the disk says that it has room, and eviction makes none."""
    server = open_server()
    assert server.put(range(60)) == {}
    rest(server)

    def refuse(*args: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patch:
        patch.setattr(server.files, "_write", refuse)
        assert server.put(range(100, 200)) == {n: "no-space" for n in range(100, 200)}
        rest(server)
        assert server.there(range(60)) == set(range(1, 60))
    assert server.put(range(100, 110)) == {}  # a page could be written
    with monkeypatch.context() as patch:
        patch.setattr(server.files, "_write", refuse)
        assert len(server.put(range(110, 120))) == 10
    rest(server)
    assert server.there(range(60)) == set(range(2, 60))


def test_who_evicts_by_the_limits_of_another_says_so(open_server: OpenServer) -> None:
    keeper = open_server()
    keeper.put(range(10))
    rest(keeper)
    assert keeper.keeps() and keeper.said == []
    other = open_server(max_files=60)
    for start in range(0, 200, 20):
        keeper.put(range(start, start + 20))
    rest(keeper, other)
    (said,) = keeper.said
    assert "by the limits of another server" in said and ": max_files 60 (none here);" in said
    assert other.said == []


def test_who_evicts_by_its_own_limits_says_nothing(open_server: OpenServer) -> None:
    keeper = open_server(max_files=60)
    other = open_server(max_files=90)
    for start in range(0, 200, 20):
        other.put(range(start, start + 20))
    rest(keeper, other)
    assert keeper.done["evicted_pages"] and keeper.said == other.said == []


def test_a_page_larger_than_the_budget(
    open_server: OpenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission_module, "WAIT_S", 2.0)
    server = open_server(max_bytes=COST // 2)
    rest(server)
    started = time.monotonic()
    assert server.put(range(8)) == {n: "budget" for n in range(8)}
    assert time.monotonic() - started < 8 * 2.0  # the wait is not paid for each page
    assert server.failures["budget"] == 8


def test_evicted_pages_are_told(open_server: OpenServer) -> None:
    server = open_server(max_bytes=BUDGET)
    server.put(range(200))
    rest(server)
    gone = set(range(200)) - server.there(range(200))
    assert sorted(server.news) == sorted((make_key(n, GROUP), False) for n in gone)


def test_an_orphaned_namespace_ages_out(root: Path, open_server: OpenServer) -> None:
    old = open_server(TierContext("old", {"other": 1}, CONTEXT.layouts), max_bytes=BUDGET)
    old.put(range(60))
    old.close()
    server = open_server(max_bytes=BUDGET)
    server.put(range(60))
    rest(server)
    left = old.there(range(60))
    assert 10 < len(left) < 40 and are_the_last(left, range(60))
    assert disk_usage(root)[0] <= BUDGET


def test_what_others_added_is_counted(root: Path, open_server: OpenServer) -> None:
    server = open_server(max_bytes=BUDGET)
    server.put(range(10))
    rest(server)
    (root / "notes").write_bytes(bytes(60 * COST))
    keeper = server.member._keeper
    assert keeper is not None
    keeper._scan_due = 0.0
    rest(server)
    server.put(range(10, 60))
    rest(server)
    assert disk_usage(root)[0] <= BUDGET
    assert (root / "notes").exists()
    assert len(server.there(range(60))) < 40


def test_quarantine_counts_and_ages_out(root: Path, open_server: OpenServer) -> None:
    server = open_server(max_bytes=BUDGET)
    server.put(range(40))
    for n in range(30):
        flip(server.paths.page(make_key(n, GROUP)))
    assert server.get(range(30)) == set()
    assert len(os.listdir(server.paths.quarantine)) == 30
    server.put(range(100, 145))
    rest(server)
    assert disk_usage(root)[0] <= BUDGET
    assert len(os.listdir(server.paths.quarantine)) == 30  # they are newer than the other ten
    server.put(range(200, 290))
    rest(server)
    assert not list(Path(server.paths.pages).glob("quarantine/*"))


def test_a_second_name_keeps_its_content(
    root: Path, tmp_path: Path, open_server: OpenServer
) -> None:
    server = open_server(max_bytes=BUDGET)
    server.put(range(80))
    kept = {}
    for n in range(80):
        copy = tmp_path / str(n)
        os.link(server.paths.page(make_key(n, GROUP)), copy)
        kept[copy] = copy.read_bytes()
    server.put(range(100, 220))
    assert all(copy.read_bytes() == data for copy, data in kept.items())
    assert check_root(str(root)).bad == []


def test_what_takes_a_victims_place_is_no_danger(tmp_path: Path, open_server: OpenServer) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    server = open_server(max_bytes=BUDGET)
    server.put(range(90))
    rest(server)
    for n in range(60):
        path = server.paths.page(make_key(n, GROUP))
        if os.path.exists(path):
            os.unlink(path)
            if n % 3 == 0:
                os.symlink(victim, path)
            elif n % 3 == 1:
                os.mkfifo(path)
            else:
                os.mkdir(path)
    assert server.put(range(100, 260)) == {}
    assert victim.read_text() == "precious"
    assert server.get(range(240, 260)) == set(range(240, 260))


@pytest.mark.parametrize("what", ["ledger", "snapshot", "journal", "all", "gone"])
def test_damaged_books_are_made_anew(root: Path, open_server: OpenServer, what: str) -> None:
    server = open_server(max_bytes=BUDGET)
    server.put(range(120))
    rest(server)
    books = root / ".kvstrata"
    copies = {path: path.read_bytes() for path in books.glob("*.journal")}
    assert copies
    server.close()
    for path, raw in copies.items():
        path.write_bytes(raw)  # as if the server had been killed
    for path in [p for p in books.iterdir() if p.is_file()]:
        if what == "gone":
            path.unlink()
        elif what == "all" or what in path.name:
            damaged = bytearray(path.read_bytes())
            for at in range(20, len(damaged), 50):
                damaged[at] ^= 0x55
            path.write_bytes(damaged[: len(damaged) - 3])
    server = open_server(max_bytes=BUDGET)
    for start in range(200, 400, 20):
        assert server.put(range(start, start + 20)) == {}
        assert disk_usage(root)[0] <= BUDGET
    rest(server)
    assert server.there(range(340, 400)) == set(range(340, 400))


def test_books_deleted_under_a_running_server(root: Path, open_server: OpenServer) -> None:
    server = open_server(max_bytes=BUDGET)
    server.put(range(120))
    for path in (root / ".kvstrata").iterdir():
        if path.is_file():
            path.unlink()
    assert set(server.put(range(200, 320)).values()) <= {"budget"}
    rest(server)
    assert server.put(range(400, 500)) == {}
    assert disk_usage(root)[0] <= BUDGET


def test_the_clock_goes_back(open_server: OpenServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server = open_server(max_bytes=BUDGET)
    server.put(range(60))
    rest(server)
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() - 10**18)
    server.put(range(60, 160))
    rest(server)
    left = server.there(range(160))
    assert left and are_the_last(left, range(160))
    server.close()
    server = open_server(max_bytes=BUDGET)
    server.put(range(200, 240))
    rest(server)
    left = server.there(range(160))
    assert left and are_the_last(left, range(160))


def test_a_promised_page_is_spared(
    open_server: OpenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(member_module, "PROTECT_S", 60.0)
    monkeypatch.setattr(replay_module, "PROTECT_S", 60.0)
    server = open_server(max_bytes=20 * COST)
    server.put(range(8))
    server.promise(range(4))
    rest(server)
    server.put(range(100, 200))
    assert server.there(range(8)) == set(range(4))
    assert server.get(range(4)) == set(range(4))  # what was loaded is spared no longer
    server.put(range(200, 300))
    assert server.there(range(8)) == set()


def test_the_books_follow_the_modes(root: Path, open_server: OpenServer) -> None:
    server = open_server(max_bytes=BUDGET, file_mode="0660", dir_mode="0770")
    server.put(range(120))
    rest(server)
    (lease,) = (root / ".kvstrata").glob("*.server")
    for path in (lease, root / ".kvstrata/ledger"):  # which all must be able to lock
        assert path.stat().st_mode & 0o777 == 0o660
    server.close()
    for directory, _, names in os.walk(root / ".kvstrata"):
        assert os.stat(directory).st_mode & 0o777 == 0o770
        for name in names:
            assert os.stat(os.path.join(directory, name)).st_mode & 0o777 & ~0o660 == 0


def test_nothing_grows(
    root: Path, open_server: OpenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Limits, "rotate_bytes", 4096)
    server = open_server(max_bytes=BUDGET)
    open_before = None
    for start in range(0, 1000, 100):
        server.put(range(start, start + 100))
        server.get(range(start + 60, start + 100))
        rest(server)
        found = len(os.listdir("/proc/self/fd"))
        assert open_before is None or found <= open_before
        open_before = found
        assert len(os.listdir(root / ".kvstrata")) < 12
        assert disk_usage(root)[0] <= BUDGET


def test_a_file_that_is_published_is_counted_whatever_comes_after(
    open_driven: OpenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = open_driven(max_bytes=BUDGET, durability="fsync")
    rest_driven(server)
    server.put([1])
    rest_driven(server)
    with server.books() as books:
        before = books.base_files
    with monkeypatch.context() as patch:
        patch.setattr("kvstrata.tiers.fs.page_files._fsync_directory", _fail)
        assert server.put([2]) == {2: "io-error"}
    rest_driven(server)
    with server.books() as books:
        assert books.base_files == before + len(server.there([2])) == before + 1
    server.die()


def _fail(path: str) -> None:
    raise OSError(5, "no longer", path)


def test_a_ledger_that_cannot_be_used_keeps_no_reservation(
    root: Path, open_driven: OpenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = open_driven(max_bytes=BUDGET)
    rest_driven(server)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", _fail_to_write)
        assert server.put([1]) != {}  # the reservation cannot be written
    (root / server.paths.pages / "000").write_text("no directory")
    real = os.pwrite
    calls = []

    def write_once(fd: int, content: bytes, position: int) -> int:
        calls.append(fd)
        if len(calls) > 1:
            raise OSError(5, "no longer")
        return real(fd, content, position)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", write_once)
        assert server.put([2]) != {}  # that it ended cannot be written
    rest_driven(server)
    with server.books() as books:
        assert not books.rows[server.id].reserved_bytes
        assert not books.rows[server.id].reserved_files
    assert server.member.admission.open == (0, 0)
    server.die()


def _fail_to_write(fd: int, content: bytes, position: int) -> int:
    raise OSError(5, "no longer")


def test_a_member_too_many_says_so_once(
    open_driven: OpenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(member_module, "MAX_ROWS", 1)
    first, second = open_driven(max_bytes=BUDGET), open_driven(max_bytes=BUDGET)
    rest_driven(first, second)
    assert second.put([1]) == {1: "budget"}
    assert [text for text in second.details if "has 1 members, which is the most" in text]
    assert second.failures == {"books": 1, "budget": 1}
    first.leave()
    rest_driven(second)
    assert second.put([1]) == {} and second.failures["books"] == 1
    second.leave()
