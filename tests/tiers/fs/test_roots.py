"""One tier over several directories."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstrata.tiers.base import Lookup, TierConfigError
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.fs.tools.scan import check_root
from kvstrata.tiers.testing import (
    CONTEXT,
    REQUEST,
    Slots,
    finish,
    load,
    make_data,
    make_job,
    make_key,
    settle,
    store,
)

OpenTier = Callable[..., FsTier]
PAGES = {make_key(n): make_data(n, CONTEXT.layouts[0].nbytes) for n in range(60)}


@pytest.fixture
def roots(tmp_path: Path) -> list[str]:
    places = [tmp_path / name for name in ("a", "b", "c")]
    for place in places:
        place.mkdir()
    return [str(place / "kv") for place in places]


def place(roots: list[str]) -> dict[bytes, str]:
    """In which root each page's file is."""
    found = {}
    for root in roots:
        for path in Path(root).glob("**/*.safetensors"):
            found[bytes.fromhex(path.stem) + bytes(4)] = root
    return found


def test_pages_are_spread_and_found_again(open_tier: OpenTier, roots: list[str]) -> None:
    tier = open_tier(root_dir=roots)
    assert not store(tier, PAGES).failed
    placed = place(roots)
    assert placed.keys() == PAGES.keys()
    assert all(list(placed.values()).count(root) > 8 for root in roots)
    assert tier.shutdown(60.0)
    tier = open_tier(root_dir=roots[::-1])  # their order does not matter
    assert all(settle(tier, key) is Lookup.HIT for key in PAGES)
    assert load(tier, list(PAGES))[1] == PAGES
    assert [check_root(root).bad for root in roots] == [[], [], []]


def test_a_lost_directory_loses_its_pages_only(open_tier: OpenTier, roots: list[str]) -> None:
    tier = open_tier(root_dir=roots)
    store(tier, PAGES)
    placed = place(roots)
    lost_disk = os.path.dirname(roots[1])
    os.rename(lost_disk, f"{lost_disk}-gone")
    result, arrived = load(tier, list(PAGES))
    lost = {key for key, root in placed.items() if root == roots[1]}
    assert result.failed == dict.fromkeys(lost, "missing")
    assert arrived.keys() == PAGES.keys() - lost
    assert set(store(tier, PAGES).failed) == lost  # what lies under a lost mount is not ours
    assert tier.shutdown(60.0)
    tier = open_tier(root_dir=[roots[0], roots[2]])  # taken out of the list
    assert load(tier, list(arrived))[1] == arrived
    assert not store(tier, PAGES).failed


def test_a_directory_that_hangs_holds_up_its_pages_only(
    open_tier: OpenTier, roots: list[str]
) -> None:
    tier = open_tier(root_dir=roots[:2])
    store(tier, PAGES)
    placed = place(roots)
    for pid in tier.processes[0].pids():
        os.kill(pid, signal.SIGSTOP)
    free = [key for key in PAGES if placed[key] == roots[1]]
    stuck = [key for key in PAGES if placed[key] == roots[0]]
    slots = Slots.make(len(stuck), CONTEXT.layouts[0].nbytes)
    tier.submit_load(make_job(1, stuck, slots, CONTEXT))
    assert load(tier, free)[1].keys() == set(free)
    for pid in tier.processes[0].pids():
        os.kill(pid, signal.SIGCONT)
    (result,) = finish(tier)
    assert result.job_id == 1 and not result.failed


def test_each_directory_has_the_budget(open_tier: OpenTier, roots: list[str]) -> None:
    tier = open_tier(root_dir=roots[:2], max_files=20)
    for key, data in PAGES.items():
        assert not store(tier, {key: data}).failed
    assert tier.drain(60.0)
    for root in roots[:2]:
        assert sum(len(names) for _, _, names in os.walk(root)) <= 20
    tier.touch(list(PAGES), REQUEST)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"root_dir: \[\] is wrong"),
        (["/a", "b"], "root_dir: 'b' is relative"),
        (["/a", 3], "root_dir: 3 is wrong"),
        (["/a", "/b", "/a/"], "root_dir: '/a' is given twice, or lies in another"),
        (["/a", "/a/b"], "root_dir: '/a/b' is given twice, or lies in another"),
        (["/", "/a"], "root_dir: '/' is the root of the whole file system"),
    ],
)
def test_wrong_lists(value: object, message: str) -> None:
    with pytest.raises(TierConfigError, match=message):
        FsTier.check_options({"root_dir": value})


def test_a_disk_that_is_dead_at_the_start(
    open_tier: OpenTier, roots: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.makedirs

    def fail(path: str, mode: int = 0o777, exist_ok: bool = False) -> None:
        if path in dead:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        real(path, mode, exist_ok)

    monkeypatch.setattr(os, "makedirs", fail)
    dead = roots[2:]
    tier = open_tier(root_dir=roots)
    assert not store(tier, PAGES).failed
    assert place(roots[:2]).keys() == PAGES.keys()
    dead = roots
    with pytest.raises(TierConfigError, match=f"root_dir: '{roots[2]}' cannot be used"):
        open_tier(root_dir=roots)


def test_one_that_cannot_be_opened(open_tier: OpenTier, roots: list[str]) -> None:
    Path(roots[1]).write_text("a file")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TierConfigError, match=f"root_dir: '{roots[1]}' is not a directory"):
        open_tier(root_dir=roots)
    assert len(os.listdir("/proc/self/fd")) == before
