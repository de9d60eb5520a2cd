"""Trimming from outside, and recency for reports."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstrata.tiers.fs.budget.journal import Journal, Op, Record, journal_name
from kvstrata.tiers.fs.budget.ledger import BOOKS_NAME
from kvstrata.tiers.fs.budget.limits import Limits, Usage, file_cost
from kvstrata.tiers.fs.budget.member import Member
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.fs.tools import trim as trim_module
from kvstrata.tiers.fs.tools.audit import audit
from kvstrata.tiers.fs.tools.scan import check_root
from kvstrata.tiers.fs.tools.trim import last_uses, trim
from kvstrata.tiers.testing import CONTEXT, load, make_data, make_key, store
from tests.waiting import wait_until

SIZE = CONTEXT.layouts[2].nbytes
COST = file_cost(SIZE + 4096)
PAGES = {make_key(n, 2): make_data(n, SIZE) for n in range(60)}


def test_trim_while_no_server_runs(root: Path, open_tier: Callable[..., FsTier]) -> None:
    tier = open_tier()
    store(tier, PAGES)
    assert tier.shutdown(60.0)
    seen: list[tuple[Usage, int]] = []
    found = trim(str(root), Limits(max_bytes=40 * COST), lambda *now: seen.append(now))
    assert found.within and 20 <= found.evicted_files < 30 and found.failures == {}
    assert found.evicted_bytes == found.evicted_files * COST
    assert seen[-1] == (found.after, found.evicted_files) and found.after.nbytes <= 40 * COST
    assert found.before.files >= 60 and found.after.files < 60 and found.members == 0
    assert check_root(str(root)).files == 60 - found.evicted_files
    again = trim(str(root), Limits(max_bytes=40 * COST))
    assert again.within and again.evicted_files == 0


def test_trim_takes_the_books_from_nobody_for_granted(
    root: Path, open_tier: Callable[..., FsTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The books are counted already, but not yet under these limits."""
    tier = open_tier()
    store(tier, PAGES)
    assert tier.shutdown(60.0)
    started = threading.Event()
    run = Member._run

    def late(member: Member) -> None:
        started.wait(10.0)
        run(member)

    monkeypatch.setattr(Member, "_run", late)
    calls: list[int] = []

    def progress(usage: Usage, deleted: int) -> None:
        calls.append(deleted)
        if len(calls) == 3:
            started.set()

    assert trim(str(root), Limits(max_files=30), progress).evicted_files >= 30


def test_trim_beside_a_server(root: Path, open_tier: Callable[..., FsTier]) -> None:
    tier = open_tier(max_bytes="1GiB")
    store(tier, PAGES)
    wait_until(lambda: len(audit(str(root)).living) == 2)  # its I/O processes
    found = trim(str(root), Limits(max_files=30))
    assert found.within and found.evicted_files == found.before.files - found.after.files
    assert found.after.files <= 30 < 60 <= found.before.files and found.members == 2
    result, _ = load(tier, list(PAGES))
    assert len(result.failed) >= 30 and set(result.failed.values()) == {"missing"}
    assert not store(tier, PAGES).failed  # the limit ended with the trimming
    assert not load(tier, list(PAGES))[0].failed


def test_trim_says_why_the_books_cannot_be_kept(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trim_module, "_STUCK_S", 0.2)
    (root / ".kvstrata/ledger").mkdir(parents=True)
    with pytest.raises(OSError, match="Is a directory"):
        trim(str(root), Limits(max_bytes=2**20))


def test_trim_that_cannot_succeed(root: Path) -> None:
    root.mkdir()
    (root / "foreign").write_bytes(bytes(10**5))
    found = trim(str(root), Limits(max_bytes=10**5))
    assert found.refused and not found.within and found.before == found.after
    assert (found.fixed.files, found.fixed.nbytes) == (1, 26 * 4096)  # its directory, too
    assert list(root.iterdir()) == [root / "foreign"]


def test_trim_that_is_stuck(
    root: Path, open_tier: Callable[..., FsTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What grows meanwhile is no reason to wait for ever."""
    tier = open_tier()
    store(tier, PAGES)
    assert tier.shutdown(60.0)
    survey = trim_module._survey

    def survey_and_grow(root: str) -> tuple[Usage, Usage]:
        found = survey(root)
        Path(root, ".kvstrata/foreign").write_bytes(bytes(10**6))
        return found

    def progress(usage: Usage, deleted: int) -> None:
        if deleted == 60:
            monkeypatch.setattr(trim_module, "_STUCK_S", 0.2)

    monkeypatch.setattr(trim_module, "_survey", survey_and_grow)
    found = trim(str(root), Limits(max_bytes=10**6), progress)
    assert not found.within and not found.refused and found.evicted_files == 60


def test_trim_needs_a_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        trim(str(tmp_path / "none"), Limits(max_bytes=1))


def test_last_uses(root: Path, open_tier: Callable[..., FsTier]) -> None:
    assert last_uses(str(root)) == {}
    before = time.time()
    tier = open_tier(max_bytes="1GiB")
    store(tier, PAGES)
    assert tier.shutdown(60.0)
    found = last_uses(str(root))
    assert list(found) == [tier.paths[0].name]
    assert before - 1 <= next(iter(found.values())) <= time.time() + 1


def test_last_uses_knows_uses_from_other_records(
    root: Path, open_tier: Callable[..., FsTier]
) -> None:
    """A journal that only tells of losses is no use, however new it is."""
    tier = open_tier(max_bytes="1GiB")
    store(tier, PAGES)
    assert tier.shutdown(60.0)
    trim(str(root), Limits())  # the snapshot covers the journals
    before = last_uses(str(root))
    journal = Journal(str(root / BOOKS_NAME), bytes(16), tier.paths[0].name, 0o600, 2**20)
    journal.append([Record(Op.GONE, key) for key in PAGES])
    written = os.stat(root / BOOKS_NAME / journal_name(bytes(16), 1)).st_mtime
    assert last_uses(str(root)) == before and before[tier.paths[0].name] < written
    journal.append([Record(Op.USED, next(iter(PAGES)))])
    assert last_uses(str(root))[tier.paths[0].name] >= written
