"""What goes wrong while the engine runs: failed results, counted, and life goes on."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstrata.tiers.base import Job, Lookup, Page
from kvstrata.tiers.fs import files as files_module
from kvstrata.tiers.fs import io
from kvstrata.tiers.fs.layout import NamespacePaths
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.testing import (
    CONTEXT,
    REQUEST,
    finish,
    load,
    make_data,
    make_key,
    settle,
    store,
)

OpenTier = Callable[..., FsTier]
KEY = make_key(1)
PAGE = {KEY: make_data(1, CONTEXT.layouts[0].nbytes)}


def fail(number: int) -> Callable[..., int]:
    def raise_it(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    return raise_it


def names_below(root: Path) -> list[str]:
    return [name for _, _, names in os.walk(root) for name in names]


def test_the_root_is_removed(open_tier: OpenTier, root: Path) -> None:
    tier = open_tier()
    store(tier, PAGE)
    shutil.rmtree(root)
    assert load(tier, [KEY])[0].failed == {KEY: "missing"}
    assert settle(tier, KEY) is Lookup.MISS
    # perhaps a mount went away: what lies under it is not ours to fill
    assert store(tier, PAGE).failed == {KEY: "no-directory"}
    assert not root.exists()
    root.mkdir()
    assert not store(tier, PAGE).failed
    assert load(tier, [KEY])[1] == PAGE


def test_the_root_is_emptied(open_tier: OpenTier, root: Path, paths: NamespacePaths) -> None:
    tier = open_tier()
    store(tier, PAGE)
    for directory in root.iterdir():
        shutil.rmtree(directory)
    assert not store(tier, PAGE).failed
    assert Path(paths.config).exists()
    assert load(open_tier(), [KEY])[1] == PAGE


def test_the_root_becomes_a_file(open_tier: OpenTier, root: Path) -> None:
    tier = open_tier()
    store(tier, PAGE)
    shutil.rmtree(root)
    root.write_text("x")
    assert load(tier, [KEY])[0].failed == {KEY: "missing"}
    assert store(tier, PAGE).failed == {KEY: "no-directory"}


def test_a_directory_is_a_dangling_link(open_tier: OpenTier, paths: NamespacePaths) -> None:
    tier = open_tier()
    os.symlink("nowhere", Path(paths.page(KEY)).parents[1])
    assert store(tier, PAGE).failed == {KEY: "no-directory"}


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
@pytest.mark.parametrize("call", ["open", "pwritev", "rename"])
def test_stores_that_fail(
    open_tier: OpenTier,
    root: Path,
    call: str,
    number: int,
    cause: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tier = open_tier()
    store(tier, {make_key(2): PAGE[KEY]})
    with monkeypatch.context() as patch:
        patch.setattr(files_module.os, call, fail(number))
        assert store(tier, PAGE).failed == {KEY: cause}
        assert settle(tier, KEY) is Lookup.MISS
    assert tier.stats().failures == {cause: 1}
    assert not [name for name in names_below(root) if name.endswith(".tmp")]
    assert not store(tier, PAGE).failed
    assert load(tier, [KEY])[1] == PAGE


def test_a_disk_that_fills_up(open_tier: OpenTier, small_disk: Path) -> None:
    tier = open_tier(root_dir=str(small_disk))
    data = {make_key(n): make_data(n, CONTEXT.layouts[0].nbytes) for n in range(60)}
    result = store(tier, data)
    assert 0 < len(result.failed) < 60 and set(result.failed.values()) == {"no-space"}
    assert tier.stats().failures == {"no-space": len(result.failed)}
    stored = [key for key in data if key not in result.failed]
    assert load(tier, stored)[1] == {key: data[key] for key in stored}
    assert not [name for name in names_below(small_disk) if name.endswith(".tmp")]


def test_a_disk_that_cannot_be_read(open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = open_tier()
    store(tier, PAGE)
    with monkeypatch.context() as patch:
        patch.setattr(io.os, "preadv", fail(errno.EIO))
        assert load(tier, [KEY])[0].failed == {KEY: "io-error"}
    # the file is left, but not believed until it was written again
    assert settle(tier, KEY) is Lookup.MISS
    assert not store(tier, PAGE).failed
    assert settle(tier, KEY) is Lookup.HIT
    assert load(tier, [KEY])[1] == PAGE


def test_a_lookup_that_fails(open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch) -> None:
    store(open_tier(), PAGE)
    tier = open_tier()
    assert tier.drain(60.0)
    with monkeypatch.context() as patch:
        patch.setattr(files_module.os, "lstat", fail(errno.EIO))
        assert settle(tier, KEY) is Lookup.MISS
    assert tier.stats().failures == {"io-error": 1}
    tier.on_request_finished(REQUEST)
    assert settle(tier, KEY) is Lookup.HIT


def test_a_view_that_cannot_be_written(open_tier: OpenTier) -> None:
    tier = open_tier()
    store(tier, PAGE)
    view = memoryview(bytes(CONTEXT.layouts[0].nbytes))
    tier.submit_load(Job(3, (Page(KEY, 0, 0, 0, view),), REQUEST))
    assert finish(tier)[0].failed == {KEY: "internal"}
    # that says nothing about the file
    assert tier.lookup(KEY, REQUEST) is Lookup.HIT and not list(tier.take_removed())
    assert load(tier, [KEY])[1] == PAGE


def test_fsync_comes_before_the_name(
    open_tier: OpenTier, paths: NamespacePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier(durability="fsync")
    calls: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        calls.append("page" if path.endswith(".tmp") else os.path.basename(path))
        fsync(fd)

    def note_rename(source: str, target: str) -> None:
        calls.append("rename")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files_module.os, "fsync", note_fsync)
        patch.setattr(files_module.os, "rename", note_rename)
        store(tier, PAGE)
        store(tier, {make_key(2): PAGE[KEY]})
    home = os.path.basename(paths.pages)
    assert calls == [
        *["000", home, "root", "page", "rename", "00_g0"],  # with the new directories
        *["page", "rename", "00_g0"],
    ]


def test_an_error_nobody_thought_of(open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch) -> None:
    def surprise(*args: object) -> str:
        raise RuntimeError("surprise")

    tier = open_tier()
    with monkeypatch.context() as patch:
        patch.setattr(files_module, "page_checksum", surprise)
        assert store(tier, PAGE).failed == {KEY: "internal"}
    assert tier.stats().failures == {"internal": 1}
    assert not store(tier, PAGE).failed
