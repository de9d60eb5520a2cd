"""What the books tell of all pages, and when a look-up need not wait for the disk."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvstrata.tiers.base import Lookup, RequestView
from kvstrata.tiers.fs.budget import member as member_module
from kvstrata.tiers.fs.budget.ledger import BOOKS_NAME, LEDGER_NAME
from kvstrata.tiers.fs.budget.snapshot import SNAPSHOT_NAME
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.process import supervisor as supervisor_module
from kvstrata.tiers.testing import CONTEXT, load, make_data, make_key, settle, store
from tests.waiting import wait_until

OpenTier = Callable[..., FsTier]

PAGES = {make_key(n): make_data(n, CONTEXT.layouts[0].nbytes) for n in range(20)}
KEYS = list(PAGES)
UNKNOWN = make_key(1000)


def told(tier: FsTier) -> bool:
    tier.get_finished()
    return tier._index.told


def answer(tier: FsTier, key: bytes, request: str = "new") -> Lookup:
    return tier.lookup(key, RequestView(request))


def test_on_a_new_root_a_miss_needs_no_second_look(open_tier: OpenTier) -> None:
    tier = open_tier()
    wait_until(lambda: told(tier))
    assert {answer(tier, key) for key in KEYS} == {Lookup.MISS}
    store(tier, PAGES)
    assert {answer(tier, key) for key in KEYS} == {Lookup.HIT}
    assert answer(tier, UNKNOWN) is Lookup.MISS
    assert load(tier, KEYS)[1] == PAGES


def test_after_a_start_all_pages_are_told_before_a_miss_is(open_tier: OpenTier) -> None:
    tier = open_tier()
    store(tier, PAGES)
    assert tier.shutdown(60.0)
    tier = open_tier()
    wait_until(lambda: told(tier))
    assert {answer(tier, key) for key in KEYS} == {Lookup.HIT}
    assert answer(tier, UNKNOWN) is Lookup.MISS


def test_files_without_books_are_told_once_they_are_counted(
    open_tier: OpenTier, root: Path
) -> None:
    tier = open_tier()
    store(tier, PAGES)
    assert tier.shutdown(60.0)
    shutil.rmtree(root / BOOKS_NAME)
    tier = open_tier()
    wait_until(lambda: told(tier))
    assert {answer(tier, key) for key in KEYS} == {Lookup.HIT}
    assert answer(tier, UNKNOWN) is Lookup.MISS


def test_a_count_that_was_not_written_down_is_not_believed(open_tier: OpenTier, root: Path) -> None:
    """As older versions left it when they were killed."""
    tier = open_tier()
    store(tier, PAGES)
    assert tier.shutdown(60.0)
    (root / BOOKS_NAME / SNAPSHOT_NAME).unlink()
    tier = open_tier()
    assert settle(tier, UNKNOWN) is Lookup.MISS
    assert settle(tier, KEYS[0]) is Lookup.HIT
    wait_until((root / BOOKS_NAME / SNAPSHOT_NAME).exists)  # for the next start
    assert not told(tier) and answer(tier, make_key(1001)) is Lookup.RETRY
    assert tier.shutdown(60.0)
    tier = open_tier()
    wait_until(lambda: told(tier))
    assert {answer(tier, key) for key in KEYS} == {Lookup.HIT}


def test_a_damaged_snapshot_is_not_all(open_tier: OpenTier, root: Path) -> None:
    tier = open_tier()
    store(tier, PAGES)
    assert tier.shutdown(60.0)
    path = root / BOOKS_NAME / SNAPSHOT_NAME
    raw = bytearray(path.read_bytes())
    raw[-20] ^= 1
    path.write_bytes(raw)
    tier = open_tier()
    wait_until(lambda: told(tier) or path.read_bytes() != raw)
    assert not told(tier) and answer(tier, KEYS[0]) is Lookup.RETRY
    assert settle(tier, KEYS[0]) is Lookup.HIT


def test_a_lost_ledger_ends_the_answers_until_all_is_counted(
    open_tier: OpenTier, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier()
    store(tier, PAGES)
    wait_until(lambda: told(tier))
    seen = [True]
    running = tier.processes[0]._writers.current
    assert running is not None
    hear = tier.processes[0]._hear

    def note(*arguments: Any) -> None:
        hear(*arguments)
        if seen[-1] != running.complete:
            seen.append(running.complete)

    monkeypatch.setattr(tier.processes[0], "_hear", note)
    os.unlink(root / BOOKS_NAME / LEDGER_NAME)
    wait_until(lambda: told(tier) and seen == [True, False, True])
    assert answer(tier, UNKNOWN) is Lookup.MISS
    assert {answer(tier, key) for key in KEYS} == {Lookup.HIT}


def test_without_books_the_disk_is_asked(
    open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstrata.tiers.fs.startup.open_books", lambda config: None)
    tier = open_tier()
    assert settle(tier, KEYS[0]) is Lookup.MISS
    for number in range(20):
        assert not told(tier)
        assert answer(tier, UNKNOWN, str(number)) is Lookup.RETRY
        time.sleep(0.005)


def test_a_new_process_tells_all_anew(open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "RESTART_S", 0.01)
    tier = open_tier()
    wait_until(lambda: told(tier))
    os.kill(tier.processes[0].pids()[1], 9)
    wait_until(lambda: not told(tier))
    assert answer(tier, UNKNOWN) is Lookup.RETRY
    other = open_tier()
    store(other, PAGES)
    assert other.shutdown(60.0)
    wait_until(lambda: told(tier))
    assert {answer(tier, key) for key in KEYS} == {Lookup.HIT}


def test_while_another_engine_stores_the_disk_is_asked(open_tier: OpenTier) -> None:
    """What it stored a moment ago is found, before the books say so."""
    ours = open_tier()
    wait_until(lambda: told(ours))
    theirs = open_tier()
    wait_until(lambda: not told(ours))
    for number, (key, data) in enumerate(PAGES.items()):
        store(theirs, {key: data})
        assert settle(ours, key, RequestView(f"new {number}")) is Lookup.HIT
    assert load(ours, KEYS)[1] == PAGES
    assert theirs.shutdown(60.0)
    wait_until(lambda: told(ours))


def test_pages_that_somebody_copied_there_are_found_together(
    open_tier: OpenTier, root: Path, tmp_path: Path
) -> None:
    """The first request asks for one key and is told MISS; the next learns of all."""
    tier = open_tier(root_dir=str(tmp_path / "elsewhere"))
    store(tier, PAGES)
    source = Path(tier.paths[0].pages)
    tier = open_tier()
    wait_until(lambda: told(tier))
    shutil.copytree(source, tier.paths[0].pages, dirs_exist_ok=True)
    assert answer(tier, KEYS[0], "first") is Lookup.MISS
    tier.on_step_end()
    assert tier.drain(60.0)
    tier.on_step_end()
    assert answer(tier, KEYS[0], "second") is Lookup.HIT
    assert {settle(tier, key, RequestView("second")) for key in KEYS} == {Lookup.HIT}


def test_all_roots_must_have_told(open_tier: OpenTier, root: Path, tmp_path: Path) -> None:
    roots = [str(root), str(tmp_path / "second")]
    tier = open_tier(root_dir=roots)
    store(tier, PAGES)
    wait_until(lambda: told(tier))
    assert answer(tier, UNKNOWN) is Lookup.MISS
    assert tier.shutdown(60.0)
    (Path(roots[1]) / BOOKS_NAME / SNAPSHOT_NAME).unlink()
    tier = open_tier(root_dir=roots)
    wait_until(lambda: tier.get_finished() == [] and tier.processes[0].complete)
    assert not told(tier) and answer(tier, UNKNOWN) is Lookup.RETRY


def test_an_engine_that_was_idle_believes_no_miss_before_it_heard_all(
    open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "_IDLE_PACKETS", 1)
    ours = open_tier()
    wait_until(lambda: told(ours))
    theirs = open_tier()  # comes and goes while ours is idle
    for key, data in PAGES.items():
        store(theirs, {key: data})
        time.sleep(2 * member_module.TICK_S)  # so that each is a packet
    assert theirs.shutdown(60.0)
    seen = set()

    def heard_all() -> bool:
        if told(ours):
            return True
        seen.add(answer(ours, KEYS[-1], "idle"))
        return False

    wait_until(heard_all)
    assert Lookup.RETRY in seen and Lookup.MISS not in seen
    assert answer(ours, KEYS[-1], "idle") is Lookup.HIT


def test_an_engine_that_was_idle_hears_before_its_first_answer(
    open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look-up is the first thing that it does: no step has ended since another engine came."""
    monkeypatch.setattr(supervisor_module, "_CHECK_EVERY_S", 0.0)
    ours = open_tier()
    wait_until(lambda: told(ours))
    theirs = open_tier()
    store(theirs, PAGES)
    writers = ours.processes[0]._writers.current
    assert writers is not None
    wait_until(lambda: writers.process.has_word)
    time.sleep(0.5)  # longer than any pause between two steps
    assert {answer(ours, key) for key in KEYS} <= {Lookup.HIT, Lookup.RETRY}
