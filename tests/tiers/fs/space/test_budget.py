"""One server under a budget."""

import os
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from kvstrata.tiers.base import Job, Lookup, Page, RequestView, TierContext
from kvstrata.tiers.fs.layout import NamespacePaths
from kvstrata.tiers.fs.scan import check_root
from kvstrata.tiers.fs.space import space as space_module
from kvstrata.tiers.fs.space.limits import file_cost
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.testing import (
    CONTEXT,
    REQUEST,
    Slots,
    finish,
    load,
    make_data,
    make_key,
    settle,
    store,
)

OpenTier = Callable[..., FsTier]
GROUP = 2
SIZE = CONTEXT.layouts[GROUP].nbytes
COST = file_cost(SIZE + 4096)
BUDGET = 100 * COST


@pytest.fixture(autouse=True)
def note_every_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space_module, "REPEAT_S", -1.0)


def keys(numbers: Collection[int]) -> list[bytes]:
    return [make_key(n, GROUP) for n in numbers]


def put(tier: FsTier, numbers: Collection[int]) -> dict[bytes, str]:
    """Store pages in jobs of four; the causes of those that failed."""
    failed: dict[bytes, str] = {}
    numbers = list(numbers)
    for start in range(0, len(numbers), 4):
        data = {make_key(n, GROUP): make_data(n, SIZE) for n in numbers[start : start + 4]}
        failed.update(store(tier, data).failed)
    return failed


def get(tier: FsTier, numbers: Collection[int]) -> set[int]:
    """Load pages and compare them; those that arrived."""
    _, arrived = load(tier, keys(numbers))
    for key, data in arrived.items():
        assert data == make_data(int.from_bytes(key[:8], "big"), SIZE)
    return {int.from_bytes(key[:8], "big") for key in arrived}


def on_disk(paths: NamespacePaths, numbers: Collection[int]) -> set[int]:
    return {n for n in numbers if os.path.exists(paths.page(make_key(n, GROUP)))}


def are_the_last(left: set[int], numbers: Sequence[int]) -> bool:
    """Whether just the pages that were stored last are left; the four of a job are equal."""
    first = len(numbers) - len(left)
    return set(numbers[first + 4 :]) <= left <= set(numbers[max(0, first - 4) :])


def disk_usage(root: Path) -> tuple[int, int]:
    """Bytes, directories included, and files, each inode once."""
    found = {}
    for directory, _, names in os.walk(root):
        for path in (directory, *(os.path.join(directory, name) for name in names)):
            with suppress(FileNotFoundError):
                status = os.lstat(path)
                found[status.st_ino] = (status.st_blocks * 512, path != directory)
    return sum(size for size, _ in found.values()), sum(is_file for _, is_file in found.values())


def rest(tier: FsTier) -> None:
    """Wait until everything is booked and nothing more is to be evicted."""
    space = tier._space
    assert space is not None
    deadline = time.monotonic() + 60.0
    seen = None
    while True:
        assert time.monotonic() < deadline, "the books do not come to rest"
        tier.get_finished()
        with space._ledger.locked() as books:
            state = books.encode()
            row = books.rows.get(space._server)
            at_rest = books.known and not any(r.reserved_bytes for r in books.rows.values())
            if row is not None:
                row.beat = 0
            state = books.encode()
        if at_rest and state == seen and not space._events and not space._pending:
            return
        seen = state
        time.sleep(0.07)


def test_the_budget_holds(root: Path, paths: NamespacePaths, open_tier: OpenTier) -> None:
    tier = open_tier(max_bytes=BUDGET)
    for start in range(0, 400, 20):
        assert put(tier, range(start, start + 20)) == {}
        assert disk_usage(root)[0] <= BUDGET
    rest(tier)
    there = on_disk(paths, range(400))
    assert len(there) > 70 and are_the_last(there, range(400))
    assert get(tier, range(380, 400)) == set(range(380, 400))
    stats = tier.stats()
    assert stats.counters["evicted_files"] >= 300 and not stats.failures
    report = check_root(str(root))
    assert (report.bad, report.temporary) == ([], 0)
    # directories that became empty are gone
    assert all(names or inner for _, inner, names in os.walk(paths.pages))


def test_victims_are_recycled(root: Path, open_tier: OpenTier) -> None:
    tier = open_tier(max_bytes=BUDGET)
    put(tier, range(100))
    rest(tier)
    spare = {entry.inode() for entry in os.scandir(root / ".kvstrata/spare")}
    assert spare
    put(tier, range(100, 100 + len(spare)))
    rest(tier)
    page = tier._files.paths.page
    assert spare & {os.stat(page(key)).st_ino for key in keys(range(100, 100 + len(spare)))}
    assert check_root(str(root)).bad == []


def test_least_recently_used_goes_first(paths: NamespacePaths, open_tier: OpenTier) -> None:
    tier = open_tier(max_bytes=BUDGET)
    put(tier, range(80))
    assert get(tier, range(10)) == set(range(10))
    tier.touch(keys(range(10, 20)), REQUEST)
    for key in keys(range(20, 30)):
        assert settle(tier, key) is Lookup.HIT
    rest(tier)
    put(tier, range(100, 150))
    rest(tier)
    assert on_disk(paths, range(30)) == set(range(30))
    assert not on_disk(paths, range(30, 50))


def test_the_deepest_page_of_a_prefix_goes_first(
    paths: NamespacePaths, open_tier: OpenTier
) -> None:
    tier = open_tier(max_bytes=BUDGET)
    slots = Slots.make(40, SIZE)
    pages = tuple(
        Page(key, GROUP, 16 * (n + 1), n, slots.view(n)) for n, key in enumerate(keys(range(40)))
    )
    tier.submit_store(Job(1, pages, REQUEST))
    assert not finish(tier)[0].failed
    rest(tier)
    put(tier, range(100, 180))
    rest(tier)
    left = on_disk(paths, range(40))
    assert left and left == set(range(len(left))) != set(range(40))


def test_use_survives_a_restart(paths: NamespacePaths, open_tier: OpenTier) -> None:
    tier = open_tier(max_bytes=BUDGET)
    put(tier, range(80))
    get(tier, range(10))
    assert tier.shutdown(60.0)
    for n in range(10):
        os.utime(paths.page(make_key(n, GROUP)), (0, 0))  # file times are not believed
    tier = open_tier(max_bytes=BUDGET // 2)  # and a smaller budget trims
    rest(tier)
    left = on_disk(paths, range(80))
    assert 30 < len(left) < 50 and set(range(10)) <= left
    assert are_the_last(left - set(range(10)), range(80))


def test_a_directory_over_budget_is_trimmed_by_age(
    root: Path, paths: NamespacePaths, open_tier: OpenTier
) -> None:
    tier = open_tier()
    put(tier, range(150))
    assert not (root / ".kvstrata").exists()
    for n in range(150):
        os.utime(paths.page(make_key(n, GROUP)), (0, 1000 + (n * 7) % 150))
    assert tier.shutdown(60.0)
    tier = open_tier(max_bytes=BUDGET)
    rest(tier)
    assert disk_usage(root)[0] <= BUDGET
    left = on_disk(paths, range(150))
    newest = sorted(range(150), key=lambda n: (n * 7) % 150)[-len(left) :]
    assert len(left) > 80 and left == set(newest)
    assert put(tier, range(200, 210)) == {}


def test_max_files(root: Path, paths: NamespacePaths, open_tier: OpenTier) -> None:
    tier = open_tier(max_files=60)
    for start in range(0, 200, 20):
        assert put(tier, range(start, start + 20)) == {}
        assert disk_usage(root)[1] <= 60
    rest(tier)
    assert on_disk(paths, range(160, 200)) == set(range(160, 200))


@pytest.mark.parametrize("least", [600_000, "30%"])
def test_min_free_bytes(disk: Callable[[str], Path], open_tier: OpenTier, least: int | str) -> None:
    root = disk("2m")
    tier = open_tier(root_dir=str(root / "kv"), min_free_bytes=least)
    for start in range(0, 200, 20):
        assert put(tier, range(start, start + 20)) == {}
        found = os.statvfs(root)
        assert found.f_bavail * found.f_frsize >= 600_000
    rest(tier)
    assert get(tier, range(180, 200)) == set(range(180, 200))
    (root / "else").write_bytes(bytes(500_000))  # somebody else takes space
    rest(tier)
    put(tier, range(300, 304))
    rest(tier)
    found = os.statvfs(root)
    assert found.f_bavail * found.f_frsize >= 600_000


def test_a_full_disk_evicts(disk: Callable[[str], Path], open_tier: OpenTier) -> None:
    root = disk("1m")
    tier = open_tier(root_dir=str(root / "kv"), max_bytes="1GiB")
    failed: dict[bytes, str] = {}
    for start in range(0, 400, 20):
        failed.update(put(tier, range(start, start + 20)))
        rest(tier)
    assert failed and set(failed.values()) == {"no-space"}
    assert tier.stats().counters["evicted_files"] > 100
    assert check_root(str(root / "kv")).bad == []
    assert len(get(tier, range(380, 400))) > 5


def test_a_page_larger_than_the_budget(open_tier: OpenTier) -> None:
    tier = open_tier(max_bytes=COST // 2)
    started = time.monotonic()
    assert put(tier, range(8)) == {key: "budget" for key in keys(range(8))}
    assert time.monotonic() - started < 30.0  # the wait is not paid for each page
    assert tier.stats().failures["budget"] == 8


def test_evicted_pages_are_forgotten(paths: NamespacePaths, open_tier: OpenTier) -> None:
    tier = open_tier(max_bytes=BUDGET)
    put(tier, range(200))
    rest(tier)
    removed = set(tier.take_removed())
    gone = set(range(200)) - on_disk(paths, range(200))
    assert removed == set(keys(gone))
    assert settle(tier, make_key(0, GROUP)) is Lookup.MISS


def test_an_orphaned_namespace_ages_out(root: Path, open_tier: OpenTier) -> None:
    old = TierContext("old", {"other": 1}, CONTEXT.layouts)
    tier = open_tier(old, max_bytes=BUDGET)
    put(tier, range(60))
    assert tier.shutdown(60.0)
    old_paths = tier._files.paths
    tier = open_tier(max_bytes=BUDGET)
    put(tier, range(60))
    rest(tier)
    left = on_disk(old_paths, range(60))
    assert 10 < len(left) < 40 and are_the_last(left, range(60))
    assert disk_usage(root)[0] <= BUDGET


def test_what_others_added_is_counted(
    root: Path, paths: NamespacePaths, open_tier: OpenTier
) -> None:
    tier = open_tier(max_bytes=BUDGET)
    put(tier, range(10))
    rest(tier)
    (root / "notes").write_bytes(bytes(60 * COST))
    assert tier._space is not None and tier._space._keeper is not None
    tier._space._keeper._scan_due = 0.0
    time.sleep(0.3)
    put(tier, range(10, 60))
    rest(tier)
    assert disk_usage(root)[0] <= BUDGET
    assert (root / "notes").exists()
    assert len(on_disk(paths, range(60))) < 40


def test_quarantine_counts_and_ages_out(
    root: Path, paths: NamespacePaths, open_tier: OpenTier
) -> None:
    tier = open_tier(max_bytes=BUDGET)
    put(tier, range(40))
    for key in keys(range(30)):
        path = Path(paths.page(key))
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    assert get(tier, range(30)) == set()
    assert len(os.listdir(paths.quarantine)) == 30
    put(tier, range(100, 190))
    rest(tier)
    assert disk_usage(root)[0] <= BUDGET
    assert tier.shutdown(60.0)
    tier = open_tier(max_bytes=BUDGET)  # its scan learns the names
    put(tier, range(200, 290))
    rest(tier)
    assert len(list(Path(paths.pages).glob("quarantine/*"))) < 30


def test_a_second_name_keeps_its_content(
    root: Path, paths: NamespacePaths, tmp_path: Path, open_tier: OpenTier
) -> None:
    tier = open_tier(max_bytes=BUDGET)
    put(tier, range(80))
    kept = {}
    for n in range(80):
        copy = tmp_path / str(n)
        os.link(paths.page(make_key(n, GROUP)), copy)
        kept[copy] = copy.read_bytes()
    put(tier, range(100, 220))
    assert all(copy.read_bytes() == data for copy, data in kept.items())
    assert check_root(str(root)).bad == []


def test_what_takes_a_victims_place_is_no_danger(
    root: Path, paths: NamespacePaths, tmp_path: Path, open_tier: OpenTier
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    tier = open_tier(max_bytes=BUDGET)
    put(tier, range(90))
    rest(tier)
    for n in range(0, 60, 3):
        for step, path in enumerate(paths.page(k) for k in keys(range(n, n + 3))):
            if os.path.exists(path):
                os.unlink(path)
                if step == 0:
                    os.symlink(victim, path)
                elif step == 1:
                    os.mkfifo(path)
                else:
                    os.mkdir(path)
    assert put(tier, range(100, 260)) == {}
    assert victim.read_text() == "precious"
    assert get(tier, range(240, 260)) == set(range(240, 260))


@pytest.mark.parametrize("what", ["ledger", "snapshot", "journal", "all", "gone"])
def test_damaged_books_are_made_anew(
    root: Path, paths: NamespacePaths, open_tier: OpenTier, what: str
) -> None:
    tier = open_tier(max_bytes=BUDGET)
    put(tier, range(120))
    books = root / ".kvstrata"
    copies = {path: path.read_bytes() for path in books.glob("*.journal")}
    assert tier.shutdown(60.0)
    for path, raw in copies.items():
        path.write_bytes(raw)  # as if the server had been killed
    for path in [p for p in books.iterdir() if p.is_file()]:
        if what == "gone":
            path.unlink()
        elif what == "all" or what in path.name:
            raw = bytearray(path.read_bytes())
            for at in range(20, len(raw), 50):
                raw[at] ^= 0x55
            path.write_bytes(raw[: len(raw) - 3])
    tier = open_tier(max_bytes=BUDGET)
    for start in range(200, 400, 20):
        assert put(tier, range(start, start + 20)) == {}
        assert disk_usage(root)[0] <= BUDGET
    rest(tier)
    assert len(on_disk(paths, range(340, 400))) == 60
    space = tier._space
    assert space is not None and space._keeper is not None
    with space._ledger.locked() as found:
        total = found.base_bytes
    keeper = space._keeper
    assert total == keeper._catalog.nbytes + keeper._other[0] + keeper._meta[0]


def test_books_deleted_under_a_running_server(root: Path, open_tier: OpenTier) -> None:
    tier = open_tier(max_bytes=BUDGET)
    put(tier, range(120))
    for path in (root / ".kvstrata").iterdir():
        if path.is_file():
            path.unlink()
    failed = put(tier, range(200, 320))
    assert set(failed.values()) <= {"budget"}
    rest(tier)
    assert put(tier, range(400, 500)) == {}
    assert disk_usage(root)[0] <= BUDGET


def test_the_clock_goes_back(
    paths: NamespacePaths, open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier(max_bytes=BUDGET)
    put(tier, range(60))
    rest(tier)
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() - 10**18)
    put(tier, range(60, 160))
    rest(tier)
    left = on_disk(paths, range(160))
    assert left and are_the_last(left, range(160))
    assert tier.shutdown(60.0)
    tier = open_tier(max_bytes=BUDGET)
    put(tier, range(200, 240))
    rest(tier)
    left = on_disk(paths, range(160))
    assert left and are_the_last(left, range(160))


def test_a_server_without_limits_keeps_those_of_others(root: Path, open_tier: OpenTier) -> None:
    open_tier(max_bytes=BUDGET)
    free = open_tier()
    assert put(free, range(200)) == {}
    rest(free)
    assert disk_usage(root)[0] <= BUDGET


def test_the_smallest_limit_rules_while_its_server_runs(root: Path, open_tier: OpenTier) -> None:
    large, small = open_tier(max_bytes=2 * BUDGET), open_tier(max_bytes=BUDGET)
    put(large, range(200))
    rest(large)
    assert disk_usage(root)[0] <= BUDGET
    assert small.shutdown(60.0)
    put(large, range(300, 400))
    rest(large)
    assert BUDGET < disk_usage(root)[0] <= 2 * BUDGET


def test_a_promised_page_is_spared(
    paths: NamespacePaths, open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space_module, "PROTECT_S", 60.0)
    tier = open_tier(max_bytes=20 * COST)
    put(tier, range(4))
    for n in range(4):
        assert settle(tier, make_key(n, GROUP), RequestView(str(n))) is Lookup.HIT
    rest(tier)
    put(tier, range(100, 200))
    assert on_disk(paths, range(4)) == set(range(4))


def test_the_books_follow_the_modes(root: Path, open_tier: OpenTier) -> None:
    tier = open_tier(max_bytes=BUDGET, file_mode="0660", dir_mode="0770")
    put(tier, range(120))
    rest(tier)
    assert tier.shutdown(60.0)
    for directory, _, names in os.walk(root / ".kvstrata"):
        assert os.stat(directory).st_mode & 0o777 == 0o770
        for name in names:
            assert os.stat(os.path.join(directory, name)).st_mode & 0o777 & ~0o660 == 0


def test_nothing_grows(root: Path, open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("keeper", "space"):
        monkeypatch.setattr(f"kvstrata.tiers.fs.space.{module}.rotate_bytes", lambda _: 4096)
    tier = open_tier(max_bytes=BUDGET)
    open_before = None
    for start in range(0, 1000, 100):
        put(tier, range(start, start + 100))
        get(tier, range(start + 60, start + 100))
        rest(tier)
        found = len(os.listdir("/proc/self/fd"))
        assert open_before is None or found <= open_before
        open_before = found
        assert len(os.listdir(root / ".kvstrata")) < 12
        assert disk_usage(root)[0] <= BUDGET
