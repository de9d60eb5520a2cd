"""What goes wrong while the engine runs: failed results, counted, and life goes on."""

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvstrata.tiers.base import Lookup
from kvstrata.tiers.fs import page_files as files_module
from kvstrata.tiers.fs import startup as startup_module
from kvstrata.tiers.fs.config import FsConfig
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.ground import Ground
from kvstrata.tiers.fs.page_files import PageFiles
from kvstrata.tiers.fs.startup import make_root, open_namespace
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.process.medium import Outcome, PageRef
from kvstrata.tiers.testing import (
    CONTEXT,
    REQUEST,
    load,
    make_data,
    make_key,
    settle,
    store,
)
from tests.waiting import wait_until

OpenTier = Callable[..., FsTier]
KEY = make_key(1)
PAGE = {KEY: make_data(1, CONTEXT.layouts[0].nbytes)}


def names_below(root: Path) -> list[str]:
    return [name for _, _, names in os.walk(root) for name in names]


@pytest.mark.parametrize("books", [True, False])
def test_the_root_is_removed(
    open_tier: OpenTier, root: Path, books: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its content may be, at any time; it is made again as it was."""
    if not books:
        monkeypatch.setattr(startup_module, "open_books", lambda config: None)
    root.mkdir()
    root.chmod(0o2750)
    tier = open_tier()
    store(tier, PAGE)
    root.rename(root.with_name("gone"))  # at once, as nobody else can see it
    assert load(tier, [KEY])[0].failed == {KEY: "missing"}
    assert settle(tier, KEY) is Lookup.MISS
    wait_until(lambda: not store(tier, PAGE).failed)
    assert root.stat().st_mode & 0o7777 == 0o2750
    assert load(tier, [KEY])[1] == PAGE


def test_the_root_goes_with_what_it_was_in(open_tier: OpenTier, root: Path) -> None:
    """Perhaps a mount went away: what lies under it is not ours to fill."""
    tier = open_tier(root_dir=str(root / "kv"))
    store(tier, PAGE)
    root.rename(root.with_name("gone"))
    assert store(tier, PAGE).failed == {KEY: "no-directory"}
    assert not root.exists()
    root.mkdir()
    assert store(tier, PAGE).failed == {KEY: "no-directory"}
    assert list(root.iterdir()) == []
    (root / "kv").mkdir()
    wait_until(lambda: not store(tier, PAGE).failed)
    assert load(tier, [KEY])[1] == PAGE


def test_ground(root: Path, small_disk: Path) -> None:
    root.mkdir()
    for path in (root, small_disk):
        with pytest.raises(FileNotFoundError):
            replace(Ground.of(str(path)), root=str(path / "none" / "deep")).restore()
    assert Ground.of(str(small_disk)).above is None  # a file system is mounted there
    ground = Ground.of(str(root))
    ground.restore()
    root.rmdir()
    ground.restore()
    assert root.is_dir()
    with pytest.raises(FileNotFoundError, match="its disk is not there"):
        replace(Ground.of(str(small_disk)), root=str(root / "x")).restore()


def test_the_root_is_emptied(open_tier: OpenTier, root: Path, paths: NamespacePaths) -> None:
    tier = open_tier()
    store(tier, PAGE)
    for directory in root.iterdir():
        shutil.rmtree(directory, ignore_errors=True)  # the books are written meanwhile
    assert not Path(paths.config).exists() and not Path(paths.pages).exists()
    assert not store(tier, PAGE).failed
    assert Path(paths.config).exists()
    assert load(open_tier(), [KEY])[1] == PAGE


def test_the_root_becomes_a_file(open_tier: OpenTier, root: Path) -> None:
    tier = open_tier()
    store(tier, PAGE)
    root.rename(root.with_name("gone"))
    root.write_text("x")
    assert load(tier, [KEY])[0].failed == {KEY: "missing"}
    assert store(tier, PAGE).failed == {KEY: "no-directory"}


def test_a_directory_is_a_dangling_link(open_tier: OpenTier, paths: NamespacePaths) -> None:
    tier = open_tier()
    os.symlink("nowhere", Path(paths.page(KEY)).parents[1])
    assert store(tier, PAGE).failed == {KEY: "symlink"}


def page_failures(tier: FsTier) -> dict[str, int]:
    """Failures of pages; the books on the same disk fail too, now and then."""
    return {cause: n for cause, n in tier.stats().failures.items() if cause != "books"}


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (errno.ENOSPC, "no-space"),
        (errno.EDQUOT, "no-space"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "denied"),
        (errno.EIO, "io-error"),
        (errno.EMFILE, "io-error"),
    ],
)
def test_stores_that_fail(
    open_tier: OpenTier, root: Path, number: int, cause: str, faults: Any
) -> None:
    tier = open_tier()
    store(tier, {make_key(2): PAGE[KEY]})
    for times, call in enumerate(("open", "pwritev", "rename"), start=1):
        faults.set(**{call: number})
        assert store(tier, PAGE).failed == {KEY: cause}
        tier.on_request_finished(REQUEST)
        assert settle(tier, KEY) is Lookup.MISS
        assert page_failures(tier) == {cause: times}
        assert not [name for name in names_below(root) if name.endswith(".tmp")]
    faults.set()
    assert not store(tier, PAGE).failed
    assert load(tier, [KEY])[1] == PAGE


def test_a_disk_that_fills_up(open_tier: OpenTier, small_disk: Path) -> None:
    """What is stored takes the place of what was used least recently."""
    tier = open_tier(root_dir=str(small_disk))
    data = {make_key(n): make_data(n, CONTEXT.layouts[0].nbytes) for n in range(60)}
    for key, page in data.items():
        assert not store(tier, {key: page}).failed
    result, arrived = load(tier, list(data))
    assert set(result.failed.values()) == {"missing"}
    assert arrived == {key: data[key] for key in data if key not in result.failed}
    assert len(arrived) >= 8 and list(data)[-1] in arrived
    assert not [name for name in names_below(small_disk) if name.endswith(".tmp")]


def test_a_disk_that_cannot_be_read(open_tier: OpenTier, faults: Any) -> None:
    tier = open_tier()
    store(tier, PAGE)
    faults.set(preadv=errno.EIO)
    assert load(tier, [KEY])[0].failed == {KEY: "io-error"}
    # the file is left, but not believed until it was written again
    assert settle(tier, KEY) is Lookup.MISS
    faults.set()
    assert not store(tier, PAGE).failed
    assert settle(tier, KEY) is Lookup.HIT
    assert load(tier, [KEY])[1] == PAGE


def test_a_lookup_that_fails(open_tier: OpenTier, root: Path, faults: Any) -> None:
    tier = open_tier()
    store(tier, PAGE)
    assert tier.shutdown(60.0)
    shutil.rmtree(root / ".kvstrata")  # else the books tell of the page
    tier = open_tier()
    faults.set(lstat=errno.EIO)
    assert settle(tier, KEY) is Lookup.MISS
    faults.set()
    assert page_failures(tier) == {"io-error": 1}
    tier.on_request_finished(REQUEST)
    assert settle(tier, KEY) is Lookup.HIT


def test_an_error_nobody_thought_of(open_tier: OpenTier, faults: Any) -> None:
    tier = open_tier()
    faults.set(pwritev="surprise")
    assert store(tier, PAGE).failed == {KEY: "internal"}
    faults.set()
    assert tier.stats().failures == {"internal": 1}
    assert not store(tier, PAGE).failed


def test_fsync_comes_before_the_name(
    root: Path, paths: NamespacePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FsConfig(str(root), durability="fsync")
    open_namespace(make_root(config), paths, CONTEXT.namespace)
    files = PageFiles(config, CONTEXT, paths, False, lambda cause, detail: None)
    calls: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        calls.append("page" if path.endswith(".tmp") else os.path.basename(path))
        fsync(fd)

    def note_rename(source: str, target: str, **directories: int) -> None:
        calls.append("rename")
        rename(source, target, **directories)

    monkeypatch.setattr(files_module.os, "fsync", note_fsync)
    monkeypatch.setattr(files_module.os, "rename", note_rename)
    for number in (1, 2):
        view = memoryview(bytearray(PAGE[KEY]))
        assert files.store(PageRef(make_key(number)), view, 0) == Outcome(moved=True)
    home = os.path.basename(paths.pages)
    assert calls == [
        *["000", home, "root", "page", "rename", "00_g0"],  # with the new directories
        *["page", "rename", "00_g0"],
    ]


def test_a_directory_that_cannot_be_synced_stays_open_nowhere(
    root: Path, paths: NamespacePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FsConfig(str(root), durability="fsync")
    open_namespace(make_root(config), paths, CONTEXT.namespace)
    files = PageFiles(config, CONTEXT, paths, False, lambda cause, detail: None)

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "broken")

    def open_below_root() -> list[str]:
        fds = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        return [fd for fd in fds if os.path.realpath(fd).startswith(str(root))]

    monkeypatch.setattr(files_module.os, "fsync", fail)
    found = files.store(PageRef(KEY), memoryview(bytearray(PAGE[KEY])), 0)
    assert found.cause == "io-error" and not open_below_root()


def test_a_directory_that_eviction_took_is_synced_when_it_is_made_again(
    root: Path, paths: NamespacePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FsConfig(str(root), durability="fsync")
    open_namespace(make_root(config), paths, CONTEXT.namespace)
    files = PageFiles(config, CONTEXT, paths, False, lambda cause, detail: None)
    leaf = os.path.dirname(paths.page(KEY))
    os.makedirs(leaf)
    synced: list[str] = []
    fsync, really_open = os.fsync, nofollow.open

    def evict_before(path: str, flags: int, *more: int, **others: int) -> int:
        if path == leaf and flags & os.O_DIRECTORY and not synced:
            with suppress(FileNotFoundError):
                os.rmdir(leaf)
        return really_open(path, flags, *more, **others)

    def note_fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(files_module.os, "fsync", note_fsync)
    monkeypatch.setattr(nofollow, "open", evict_before)
    view = memoryview(bytearray(PAGE[KEY]))
    assert files.store(PageRef(KEY), view, 0) == Outcome(moved=True)
    assert {os.path.dirname(leaf), leaf} <= set(synced)


def test_a_view_that_cannot_be_written(root: Path, paths: NamespacePaths) -> None:
    """That says nothing about the file."""
    config = FsConfig(str(root))
    direct = open_namespace(make_root(config), paths, CONTEXT.namespace)
    files = PageFiles(config, CONTEXT, paths, direct, lambda cause, detail: None)
    view = memoryview(PAGE[KEY])
    assert files.store(PageRef(KEY), view, 0) == Outcome(moved=True)
    (found,) = files.load_many([PageRef(KEY)], [view], 0)
    assert (found.cause, found.gone, found.stuck) == ("internal", False, False)
    assert files.exists([KEY]) == [True]
