"""What may be answered from memory, and for how long."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from kvstrata.tiers.base import Lookup, RequestView
from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.process import index as index_module
from kvstrata.tiers.process.index import ABSENT_FOR_S, CHECK_WITHIN_S, Index
from kvstrata.tiers.process.messages import Kind, Task
from kvstrata.tiers.testing import (
    CONTEXT,
    REQUEST,
    Slots,
    load,
    make_data,
    make_job,
    make_key,
    settle,
    store,
)

A, B, C = b"a", b"b", b"c"
PAGE = {make_key(1): make_data(1, CONTEXT.layouts[0].nbytes)}


def test_unknown_keys_are_asked_once_for_all_requests() -> None:
    index = Index()
    assert index.lookup(A, "r1", 0.0) is Lookup.RETRY
    assert index.is_unsent(A)
    assert index.lookup(A, "r2", 0.0) is Lookup.RETRY
    assert index.lookup(B, "r1", 0.0) is Lookup.RETRY
    assert index.take_unsent() == [A, B] and not index.is_unsent(A)
    assert index.lookup(A, "r1", 0.1) is Lookup.RETRY
    assert index.take_unsent() == []
    index.answer(A, False, 0.2)
    index.answer(B, True, 0.2)
    assert index.lookup(A, "r1", 0.3) is Lookup.MISS
    assert index.lookup(A, "r2", 0.3) is Lookup.MISS
    assert index.lookup(B, "r3", 0.3) is Lookup.HIT


def test_negative_answers_are_short_lived_and_per_request() -> None:
    index = Index()
    index.lookup(A, "r1", 0.0)
    index.take_unsent()
    index.answer(A, False, 1.0)
    assert index.lookup(A, "r1", 0.9 + ABSENT_FOR_S) is Lookup.MISS
    assert index.lookup(A, "r2", 1.0) is Lookup.RETRY  # another request asks the disk again
    assert index.lookup(A, "r1", 1.0 + ABSENT_FOR_S) is Lookup.RETRY
    index.answer(A, False, 5.0)
    index.forget_request("r1")
    assert index.lookup(A, "r1", 5.0) is Lookup.RETRY


def test_a_finished_request_leaves_nothing() -> None:
    index = Index()
    index.lookup(A, "r1", 0.0)
    index.forget_request("r1")
    index.answer(A, False, 1.0)
    assert not index._absent and not index._asked and not index._waiting


def test_a_check_without_end_is_a_miss() -> None:
    index = Index()
    index.lookup(A, "r1", 0.0)
    index.take_unsent()
    assert index.lookup(A, "r1", CHECK_WITHIN_S) is Lookup.RETRY
    assert index.lookup(A, "r1", CHECK_WITHIN_S + 0.1) is Lookup.MISS
    index.answer(A, True, 99.0)
    assert index.lookup(A, "r1", 99.0) is Lookup.HIT


def test_checks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MAX_CHECKS", 2)
    index = Index()
    answers = [index.lookup(key, "r", 0.0) for key in (A, B, C)]
    assert answers == [Lookup.RETRY, Lookup.RETRY, Lookup.MISS]


def test_present_keys_are_bounded() -> None:
    index = Index(max_present=2)
    index.add(A)
    index.add(B)
    index.touch([A, C])
    index.add(C)
    assert [index.lookup(key, "r", 0.0) for key in (A, C)] == [Lookup.HIT, Lookup.HIT]
    assert index.lookup(B, "r", 0.0) is Lookup.RETRY
    assert len(index) == 2


def test_refused_keys_stay_refused_until_stored() -> None:
    index = Index(max_refused=2)
    index.add(A)
    index.refuse(A)
    assert index.lookup(A, "r", 0.0) is Lookup.MISS
    index.answer(A, True, 0.0)  # a check that was under way
    assert index.lookup(A, "r", 0.0) is Lookup.MISS and index.is_refused(A)
    index.accept(A)
    assert index.lookup(A, "r", 0.0) is Lookup.HIT and not index.is_refused(A)
    for key in (A, B, C):
        index.refuse(key)
    assert [index.is_refused(key) for key in (A, B, C)] == [False, True, True]


def test_of_a_lost_page_only_the_disk_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MAX_LOST", 2)
    index = Index()
    index.hear(A)
    assert index.lose(A) and not index.lose(A)
    index.hear(A)  # old news
    assert index.lookup(A, "r", 0.0) is Lookup.RETRY
    index.answer(*index.take_unsent(), present=True, now=0.0)
    assert index.lookup(A, "r", 0.0) is Lookup.HIT
    for key in (A, B, C):
        index.lose(key)
        index.hear(key)
    index.hear(A)  # forgotten, since there were too many
    assert [index.is_present(key) for key in (A, B, C)] == [True, False, False]


def test_a_late_negative_answer_does_not_undo_a_store() -> None:
    index = Index()
    index.lookup(A, "r", 0.0)
    index.take_unsent()
    index.accept(A)
    index.answer(A, False, 0.1)
    assert index.lookup(A, "r", 0.2) is Lookup.HIT


def test_lookup_leaves_the_disk_to_the_processes(
    open_tier: Callable[..., FsTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = open_tier()
    store(tier, PAGE)
    sent: list[Task] = []
    submit = tier.roots[0].processes.submit

    def note(tasks: Iterable[Task]) -> None:
        sent.extend(tasks := list(tasks))
        submit(tasks)

    monkeypatch.setattr(tier.roots[0].processes, "submit", note)
    for name in ("open", "stat", "lstat", "listdir", "scandir"):
        monkeypatch.delattr(os, name)
    monkeypatch.delattr(nofollow, "open")
    try:
        assert tier.lookup(next(iter(PAGE)), REQUEST) is Lookup.HIT
        keys = [make_key(number) for number in range(2, 10)]
        for key in keys:
            assert tier.lookup(key, REQUEST) is Lookup.RETRY
        assert not sent  # a step's keys go together
        tier.on_step_end()
        assert [(t.kind, t.keys) for t in sent] == [(Kind.CHECK, keys)]
        assert tier.drain(60.0)
        tier.on_step_end()
        assert tier.lookup(keys[0], REQUEST) is Lookup.MISS
    finally:
        monkeypatch.undo()


def test_asking_again_sends_the_batch_off(open_tier: Callable[..., FsTier]) -> None:
    tier = open_tier()
    key = make_key(1)
    assert tier.lookup(key, REQUEST) is Lookup.RETRY
    tier.lookup(key, REQUEST)
    assert tier.roots[0].processes.unfinished() == (1, 0)
    assert tier.drain(60.0)
    tier.get_finished()
    assert tier.lookup(key, REQUEST) is Lookup.MISS


def test_pages_of_other_processes_become_visible(open_tier: Callable[..., FsTier]) -> None:
    ours, theirs = open_tier(), open_tier()
    key = next(iter(PAGE))
    assert settle(ours, key) is Lookup.MISS
    store(theirs, PAGE)
    assert settle(ours, key, RequestView("next")) is Lookup.HIT
    ours.on_request_finished(REQUEST)
    assert settle(ours, key) is Lookup.HIT
    assert load(ours, [key])[1] == PAGE


def test_a_page_that_vanished_leaves_the_index(
    open_tier: Callable[..., FsTier], paths: NamespacePaths
) -> None:
    tier = open_tier()
    store(tier, PAGE)
    key = next(iter(PAGE))
    os.unlink(paths.page(key))
    assert settle(tier, key) is Lookup.HIT  # not known yet
    assert load(tier, [key])[0].failed == {key: "missing"}
    assert list(tier.take_removed()) == [key]
    assert settle(tier, key) is Lookup.MISS
    assert not store(tier, PAGE).failed
    assert Path(paths.page(key)).exists()


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
