"""Look-ups: what the disk is asked, by whom, and when."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from kvstrata.tiers.base import Lookup
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.process import index as index_module
from kvstrata.tiers.process.messages import Kind, Task
from kvstrata.tiers.process.supervisor import IoProcesses
from kvstrata.tiers.testing import (
    CONTEXT,
    REQUEST,
    Slots,
    find,
    load,
    make_data,
    make_job,
    make_key,
    settle,
    store,
)

PAGE = {make_key(1): make_data(1, CONTEXT.layouts[0].nbytes)}


@pytest.fixture
def ask_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before the books have told of all pages."""
    monkeypatch.setattr(IoProcesses, "complete", False)


@pytest.mark.parametrize("told", [True, False])
def test_lookup_leaves_the_disk_to_the_processes(
    open_tier: Callable[..., FsTier], told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IoProcesses, "complete", told)
    tier = open_tier()
    store(tier, PAGE)
    sent: list[Task] = []
    submit = tier.processes[0].submit

    def note(tasks: Iterable[Task]) -> None:
        sent.extend(tasks := list(tasks))
        submit(tasks)

    monkeypatch.setattr(tier.processes[0], "submit", note)
    for name in ("open", "stat", "lstat", "listdir", "scandir"):
        monkeypatch.delattr(os, name)
    monkeypatch.delattr(nofollow, "open")
    try:
        assert tier.lookup(next(iter(PAGE)), REQUEST) is Lookup.HIT
        keys = [make_key(number) for number in range(2, 10)]
        for key in keys:
            assert tier.lookup(key, REQUEST) is (Lookup.MISS if told else Lookup.RETRY)
        assert not sent  # a step's keys go together
        tier.on_step_end()
        assert [(t.kind, t.keys) for t in sent] == [(Kind.CHECK, keys)]
        assert tier.drain(60.0)
        tier.on_step_end()
        assert tier.lookup(keys[0], REQUEST) is Lookup.MISS
    finally:
        monkeypatch.undo()


@pytest.mark.usefixtures("ask_the_disk")
def test_asking_again_sends_the_batch_off(open_tier: Callable[..., FsTier]) -> None:
    tier = open_tier()
    key = make_key(1)
    assert tier.lookup(key, REQUEST) is Lookup.RETRY
    tier.lookup(key, REQUEST)
    assert tier.processes[0].unfinished() == (1, 0)
    assert tier.drain(60.0)
    tier.get_finished()
    assert tier.lookup(key, REQUEST) is Lookup.MISS


def test_pages_of_other_processes_become_visible(open_tier: Callable[..., FsTier]) -> None:
    ours, theirs = open_tier(), open_tier()
    key = next(iter(PAGE))
    assert settle(ours, key) is Lookup.MISS
    store(theirs, PAGE)
    find(ours, key)
    ours.on_request_finished(REQUEST)
    assert settle(ours, key) is Lookup.HIT
    assert load(ours, [key])[1] == PAGE


def test_a_page_that_vanished_leaves_the_index(
    open_tier: Callable[..., FsTier], paths: NamespacePaths
) -> None:
    tier = open_tier()
    store(tier, PAGE)
    key = next(iter(PAGE))
    assert list(tier.take_changes(9)) == [(key, True)]
    os.unlink(paths.page(key))
    assert settle(tier, key) is Lookup.HIT  # not known yet
    assert load(tier, [key])[0].failed == {key: "missing"}
    assert list(tier.take_changes(9)) == [(key, False)]
    assert settle(tier, key) is Lookup.MISS
    assert not store(tier, PAGE).failed
    assert Path(paths.page(key)).exists()


@pytest.mark.usefixtures("ask_the_disk")
def test_a_disk_that_hangs_blocks_nobody(
    open_tier: Callable[..., FsTier], faults: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "CHECK_WITHIN_S", 0.05)
    tier = open_tier()  # of two processes with two threads each
    faults.set(lstat="hang")
    keys = [make_key(n) for n in range(2000)]
    for key in keys:
        tier.lookup(key, REQUEST)
    tier.on_step_end()
    slots = Slots.make(1, CONTEXT.layouts[0].nbytes)
    tier.submit_store(make_job(1, [make_key(1)], slots, CONTEXT))
    time.sleep(0.06)
    assert {tier.lookup(key, REQUEST) for key in keys} == {Lookup.MISS}
    assert not tier.drain(0.0)
    assert tier.shutdown(0.5)  # they are killed
    assert tier.get_finished()[0].failed == {make_key(1): "shutdown"}
