"""Nothing outside the root is touched, and a hostile file costs at most its own miss."""

import os
import shutil
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvstrata.tiers.base import Lookup, TierConfigError
from kvstrata.tiers.fs.budget.limits import Limits, file_cost
from kvstrata.tiers.fs.config import FsConfig
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.files.quarantine import MAX_FILES, Quarantine
from kvstrata.tiers.fs.files.temporary import sweep
from kvstrata.tiers.fs.page_files import PageFiles
from kvstrata.tiers.fs.startup import make_root, open_namespace
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.fs.tools.scan import check_root
from kvstrata.tiers.fs.tools.trim import last_uses, trim
from kvstrata.tiers.process.medium import PageRef
from kvstrata.tiers.testing import CONTEXT, REQUEST, load, make_data, make_key, settle, store
from tests.conftest import FillRoot

OpenTier = Callable[..., FsTier]
GROUP = 2
SIZE = CONTEXT.layouts[GROUP].nbytes
COST = file_cost(SIZE + 4096)
DATA = {make_key(n, GROUP): make_data(n, SIZE) for n in range(12)}
KEY = next(iter(DATA))
DEAD = f".kvstrata-{'0' * 12}-1-1-{'0' * 16}.tmp"


@pytest.fixture(params=["openat2", "steps"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways through a path, in this process."""
    if request.param == "steps":
        monkeypatch.setattr(nofollow, "_HAS_OPENAT2", False)
    elif not nofollow._HAS_OPENAT2:
        pytest.skip("no openat2 here")


def places(paths: NamespacePaths) -> dict[str, Path]:
    """The directories that could be links."""
    leaf, books = Path(paths.page(KEY)).parent, Path(paths.root) / ".kvstrata"
    return {
        "home": Path(paths.home),
        "pages": Path(paths.pages),
        "first level": leaf.parent,
        "leaf": leaf,
        "quarantine": Path(paths.quarantine),
        "books": books,
        "spares": books / "spare",
    }


PLACES = list(places(NamespacePaths("/root", "name")))


def lead_away(place: Path, outside: Path) -> None:
    """Move what is at `place` to `outside` and leave a link; a dead temporary lies there too."""
    if place.exists():
        shutil.move(place, outside)
    else:
        outside.mkdir()
        place.parent.mkdir(parents=True, exist_ok=True)
    (outside / DEAD).write_bytes(b"x")
    os.utime(outside / DEAD, (0, 0))
    place.symlink_to(outside)


def picture(directory: Path) -> dict[str, tuple[object, ...]]:
    """Everything in the directory: kind, mode, time of the last change, content."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted([directory, *directory.rglob("*")]):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (status.st_ino, status.st_mode, status.st_mtime_ns, content)
    return found


def use(tier: FsTier, root: Path) -> None:
    """All that a tier does; what comes back must be right."""
    more = {make_key(100 + n, GROUP): make_data(n, SIZE) for n in range(30)}
    for data in (DATA, more, DATA):
        result = store(tier, data)
        assert set(result.failed.values()) <= {"symlink", "budget", "io-error"}
        result, arrived = load(tier, list(data))
        assert all(arrived[key] == data[key] for key in arrived)
        assert set(result.failed.values()) <= {"symlink", "missing", "truncated"}
    settle(tier, KEY)
    tier.on_request_finished(REQUEST)
    sweep(tier.paths[0].pages, threading.Event())
    last_uses(str(root))
    check_root(str(root))


@pytest.fixture(params=[{}, {"max_bytes": 30 * COST}], ids=["", "budget"])
def budget(request: pytest.FixtureRequest) -> dict[str, int]:
    return dict(request.param)


@pytest.fixture(params=PLACES)
def case(request: pytest.FixtureRequest, budget: dict[str, int]) -> tuple[str, dict[str, int]]:
    """Where a link is, and the tier's options."""
    return request.param, budget


def test_a_link_before_the_start(
    open_tier: OpenTier,
    fill_root: FillRoot,
    root: Path,
    paths: NamespacePaths,
    tmp_path: Path,
    case: tuple[str, dict[str, int]],
) -> None:
    place, budget = case
    fill_root(root, DATA)
    lead_away(places(paths)[place], tmp_path / "outside")
    before = picture(tmp_path / "outside")
    if place == "home" or (place == "books" and budget):
        with pytest.raises(TierConfigError, match="symbolic link"):
            open_tier(**budget)
    else:
        use(open_tier(**budget), root)
    assert picture(tmp_path / "outside") == before


def test_a_link_while_running(
    open_tier: OpenTier, paths: NamespacePaths, tmp_path: Path, case: tuple[str, dict[str, int]]
) -> None:
    place, budget = case
    tier = open_tier(**budget)
    use(tier, Path(paths.root))
    lead_away(places(paths)[place], tmp_path / "outside")
    time.sleep(0.2)  # what was under way may end where it began
    before = picture(tmp_path / "outside")
    use(tier, Path(paths.root))
    assert picture(tmp_path / "outside") == before
    # without the link all is as it was
    places(paths)[place].unlink()
    deadline = time.monotonic() + 60.0
    while store(tier, DATA).failed:
        assert time.monotonic() < deadline
    result, arrived = load(tier, list(DATA))
    assert set(result.failed.values()) <= {"missing"}  # evicted since
    assert arrived == {key: DATA[key] for key in DATA if key not in result.failed}


def test_a_page_behind_a_link_is_a_miss(
    open_tier: OpenTier, paths: NamespacePaths, tmp_path: Path
) -> None:
    tier = open_tier()
    store(tier, DATA)
    leaf = Path(paths.page(KEY)).parents[1]
    lead_away(leaf, tmp_path / "outside")
    behind = [key for key in DATA if Path(paths.page(key)).parents[1] == leaf]
    result, arrived = load(tier, list(DATA))
    assert result.failed == dict.fromkeys(behind, "symlink")
    assert arrived == {key: DATA[key] for key in DATA if key not in behind}
    assert tier.stats().failures == {"symlink": len(behind)}
    assert settle(tier, KEY) is Lookup.MISS


def test_the_root_may_be_reached_through_links(
    open_tier: OpenTier, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    root.symlink_to("real")
    tier = open_tier(root_dir=f"{root}/deep")
    assert not store(tier, DATA).failed
    assert load(tier, list(DATA))[1] == DATA
    assert Path(tier.paths[0].root) == tmp_path / "real/deep"
    assert tier.shutdown(60.0)
    assert check_root(f"{root}/deep").files == len(DATA)
    assert trim(f"{root}/deep", Limits(max_bytes=5 * COST)).within


@pytest.mark.parametrize("spare", [False, True])
@pytest.mark.usefixtures("way")
def test_modes_whatever_the_umask(root: Path, spare: bool, open_tier: OpenTier) -> None:
    """Of everything below the root: pages, books, quarantine."""
    umask = os.umask(0o777 if os.geteuid() == 0 else 0o077)
    try:
        tier = open_tier(file_mode="0664", dir_mode="0775", max_bytes=(14 if spare else 99) * COST)
        for numbers in (range(0, 4), range(100, 104), range(200, 230)):
            store(tier, {make_key(n, GROUP): make_data(n, SIZE) for n in numbers})
        paths = tier.paths[0]
        Path(paths.page(make_key(229, GROUP))).write_bytes(b"")
        assert load(tier, [make_key(229, GROUP)])[0].failed
        assert tier.shutdown(60.0)  # writes the snapshot
    finally:
        os.umask(umask)
    modes = {True: {0o775}, False: {0o664}}
    found: dict[bool, set[int]] = {True: set(), False: set()}
    for path in (root, *root.rglob("*")):
        found[path.is_dir()].add(stat.S_IMODE(path.stat().st_mode))
    assert found == modes
    assert bool(tier.stats().counters["evicted_pages"]) == spare
    assert {p.name for p in (root / ".kvstrata").iterdir()} >= {"ledger", "snapshot", "spare"}


@pytest.mark.usefixtures("way")
def test_operations_follow_no_link(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for directory in (inside, outside / "deep"):
        directory.mkdir(parents=True)
    (outside / "file").write_bytes(b"x")
    (inside / "file").write_bytes(b"y")
    (inside / "link").symlink_to(outside)
    (inside / "leaf").symlink_to(outside / "file")
    before = picture(outside)
    way, leaf, plain = f"{inside}/link", f"{inside}/leaf", f"{inside}/file"
    operations: list[Callable[[], object]] = [
        lambda: nofollow.open(f"{way}/file", os.O_RDWR),
        lambda: nofollow.open(leaf, os.O_RDWR),
        lambda: nofollow.open(way, os.O_RDONLY | os.O_DIRECTORY),
        lambda: nofollow.open_or_create(f"{way}/new", os.O_RDWR, 0o600),
        lambda: nofollow.lstat(f"{way}/file"),
        lambda: nofollow.unlink(f"{way}/file"),
        lambda: nofollow.rmdir(f"{way}/deep"),
        lambda: nofollow.rename(plain, f"{way}/new"),
        lambda: nofollow.rename(f"{way}/file", f"{inside}/new"),
        lambda: nofollow.mkdir(f"{way}/new", 0o700),
        lambda: nofollow.make_directories(f"{way}/new/newer", str(inside), 0o700),
        lambda: nofollow.enter(f"{way}/new/newer", str(inside), 0o700),
        lambda: nofollow.make(f"{way}/new", str(inside), 0o700),
        lambda: nofollow.listdir(way),
        lambda: nofollow.scandir(way).__enter__(),
        lambda: nofollow.directory(way).__enter__(),
    ]
    for operation in operations:
        with pytest.raises(OSError, match="symbolic link"):
            operation()
    for climbing in (f"{inside}/../outside/file", f"{inside}/.."):
        with pytest.raises(OSError, match="cross-device"):
            nofollow.open(climbing, os.O_RDONLY)
    assert picture(outside) == before
    assert not nofollow.lexists(f"{way}/file")
    assert stat.S_ISLNK(nofollow.lstat(leaf).st_mode)
    nofollow.unlink(leaf)
    nofollow.rename(plain, f"{inside}/other")
    assert sorted(nofollow.listdir(str(inside))) == ["link", "other"]
    assert picture(outside) == before


@pytest.mark.usefixtures("way")
def test_errors_name_the_path_and_leave_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    count = len(os.listdir("/proc/self/fd"))
    for path, kind in (("none/deep", FileNotFoundError), ("file/deep", NotADirectoryError)):
        for operation in (nofollow.lstat, nofollow.unlink, nofollow.listdir):
            with pytest.raises(kind) as caught:
                operation(f"{tmp_path}/{path}")
            assert caught.value.filename == f"{tmp_path}/{path}"
    assert len(os.listdir("/proc/self/fd")) == count
    fd = nofollow.open(f"{tmp_path}/file", os.O_RDONLY)
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_the_quarantine_removes_directories_without_their_links(
    paths: NamespacePaths, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    before = picture(outside)
    Path(paths.quarantine).mkdir(parents=True)
    bad = Path(paths.pages) / "bad"
    quarantine = Quarantine(paths, 0o700)
    for _ in range(MAX_FILES + 5):
        bad.mkdir()
        (bad / "link").symlink_to(outside)
        assert quarantine.take(str(bad), "not-regular", None) == "moved"
    assert len(os.listdir(paths.quarantine)) == MAX_FILES
    assert picture(outside) == before


@pytest.fixture
def files(root: Path, paths: NamespacePaths) -> PageFiles:
    """The files as an I/O process sees them; DATA is stored."""
    config = make_root(FsConfig(str(root)))
    direct = open_namespace(config, paths, CONTEXT.namespace)
    made = PageFiles(config, CONTEXT, paths, direct, lambda cause, detail: None)
    for key, data in DATA.items():
        made.store(PageRef(key), memoryview(data), 0)
    return made


def change_while_read(
    files: PageFiles, monkeypatch: pytest.MonkeyPatch, change: Callable[[], None]
) -> Any:
    """Load KEY; `change` happens between its first and its second look at the file."""
    fstat = os.fstat

    def look(fd: int) -> os.stat_result:
        found = fstat(fd)
        monkeypatch.undo()
        change()
        return found

    monkeypatch.setattr(os, "fstat", look)
    return files.load(PageRef(KEY), memoryview(bytearray(SIZE)), 0)


def test_a_file_that_shrinks_or_grows_while_it_is_read(
    files: PageFiles, paths: NamespacePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = paths.page(KEY)
    outcome = change_while_read(files, monkeypatch, lambda: os.truncate(path, 5000))
    assert outcome.cause == "missing"  # as a rule it was recycled; who looks again finds out
    assert files.exists([KEY]) == [False] and not os.path.exists(path)
    assert files.store(PageRef(KEY), memoryview(DATA[KEY]), 0).moved
    outcome = change_while_read(files, monkeypatch, lambda: os.truncate(path, 2**40))
    assert outcome.moved  # the page itself is sound
    assert files.exists([KEY]) == [False]


def test_a_file_that_is_replaced_while_it_is_read(
    files: PageFiles, paths: NamespacePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bad one was read, the good one in its place stays."""
    path, other = paths.page(KEY), paths.root + "/other"
    shutil.copy(path, other)
    with open(path, "r+b") as file:
        file.seek(5000)
        file.write(b"?" * 100)
    outcome = change_while_read(files, monkeypatch, lambda: os.rename(other, path))
    assert outcome.cause == "missing" and os.path.exists(path)
    assert files.load(PageRef(KEY), memoryview(bytearray(SIZE)), 0).moved


def test_a_sparse_giant_and_a_device(files: PageFiles, paths: NamespacePaths) -> None:
    path = paths.page(KEY)
    os.truncate(path, 2**42)
    assert files.load(PageRef(KEY), memoryview(bytearray(SIZE)), 0).cause == "size"
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("only root can make a device")
    assert files.load(PageRef(KEY), memoryview(bytearray(SIZE)), 0).cause == "not-regular"
    assert not os.path.exists(path)


def test_hard_links_to_foreign_files_are_not_written(
    open_tier: OpenTier, root: Path, tmp_path: Path
) -> None:
    """A spare with a second name is not overwritten, though it is of the right size."""
    tier = open_tier(max_bytes=30 * COST)
    store(tier, {make_key(n, GROUP): make_data(n, SIZE) for n in range(40)})
    precious = tmp_path / "precious"
    precious.write_bytes(bytes(SIZE + 4096))
    os.utime(precious, (0, 0))
    spares, count = root / ".kvstrata/spare", 0
    for number in range(50, 90):
        for name in list(spares.iterdir()):
            name.unlink(missing_ok=True)
            os.link(precious, name)
            count += 1
        store(tier, {make_key(number, GROUP): make_data(number, SIZE)})
    assert count and precious.read_bytes() == bytes(SIZE + 4096)
    status = precious.stat()
    assert status.st_mtime == 0


def test_hostile_files_among_the_books(
    open_tier: OpenTier, root: Path, paths: NamespacePaths
) -> None:
    """The budget is kept all the same."""
    books = root / ".kvstrata"
    (books / "spare").mkdir(parents=True)
    (books / f"{'0' * 32}.00000001.journal").mkdir()
    (books / f"{'1' * 32}.00000001.journal").symlink_to("/dev/zero")
    os.mkfifo(books / f"{'2' * 32}.00000001.journal")
    (books / f"{'3' * 32}.00000001.journal").touch()
    os.truncate(books / f"{'3' * 32}.00000001.journal", 2**40)
    (books / f"{'4' * 32}.server").mkdir()
    os.mkfifo(books / "snapshot")
    (books / "spare" / f"{'9' * 19}-x").touch()
    (books / "spare" / f"{COST}-{'0' * 16}").mkdir()
    leaf = Path(paths.page(KEY)).parent
    leaf.mkdir(parents=True)
    Path(paths.page(KEY)).touch()
    os.truncate(paths.page(KEY), 2**43)
    tier = open_tier(max_bytes=2**41)
    assert not store(tier, {k: v for k, v in DATA.items() if k != KEY}).failed
    assert tier.shutdown(60.0)
    assert "internal" not in tier.stats().failures
    tier = open_tier(max_bytes=30 * COST)  # which the sparse file alone would fill
    os.unlink(books / f"{'3' * 32}.00000001.journal")
    deadline = time.monotonic() + 60.0
    more = {make_key(n, GROUP): make_data(n, SIZE) for n in range(100, 160)}
    while store(tier, more).failed:
        assert time.monotonic() < deadline
    assert tier.stats().counters["evicted_pages"] > 0
    assert "internal" not in tier.stats().failures


def test_a_page_that_is_a_hard_link_is_replaced_and_not_written(
    files: PageFiles, paths: NamespacePaths, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    os.unlink(paths.page(KEY))
    os.link(precious, paths.page(KEY))
    assert files.load(PageRef(KEY), memoryview(bytearray(SIZE)), 0).cause == "header"
    assert files.store(PageRef(KEY), memoryview(DATA[KEY]), 0).moved
    assert precious.read_bytes() == b"precious"
