"""What may be answered from memory, and for how long."""

import pytest

from kvstrata.tiers.base import Lookup
from kvstrata.tiers.process import index as index_module
from kvstrata.tiers.process.index import ABSENT_FOR_S, CHECK_WITHIN_S, Index

A, B, C = b"a", b"b", b"c"


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
