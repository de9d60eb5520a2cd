"""What may be answered from memory, and for how long."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstrata.tiers.base import Lookup
from kvstrata.tiers.process import index as index_module
from kvstrata.tiers.process.index import ABSENT_FOR_S, CHECK_WITHIN_S, DOUBT_S, Index

A, B, C = b"a", b"b", b"c"


def test_unknown_keys_are_asked_once_for_all_requests() -> None:
    index = Index()
    assert index.lookup(A, "r1", 0.0) is Lookup.RETRY
    assert index.is_awaited(A)
    assert index.lookup(A, "r2", 0.0) is Lookup.RETRY
    assert index.lookup(B, "r1", 0.0) is Lookup.RETRY
    assert index.take_unsent() == [A, B] and not index.is_awaited(A)
    assert index.lookup(A, "r1", 0.1) is Lookup.RETRY
    assert index.take_unsent() == []
    index.answer([A], [False], 0.2)
    index.answer([B], [True], 0.2)
    assert index.lookup(A, "r1", 0.3) is Lookup.MISS
    assert index.lookup(A, "r2", 0.3) is Lookup.MISS
    assert index.lookup(B, "r3", 0.3) is Lookup.HIT


def test_negative_answers_are_short_lived_and_per_request() -> None:
    index = Index()
    index.lookup(A, "r1", 0.0)
    index.take_unsent()
    index.answer([A], [False], 1.0)
    assert index.lookup(A, "r1", 0.9 + ABSENT_FOR_S) is Lookup.MISS
    assert index.lookup(A, "r2", 1.0) is Lookup.RETRY  # another request asks the disk again
    assert index.lookup(A, "r1", 1.0 + ABSENT_FOR_S) is Lookup.RETRY
    index.answer([A], [False], 5.0)
    index.forget_request("r1")
    assert index.lookup(A, "r1", 5.0) is Lookup.RETRY


def test_a_finished_request_leaves_nothing() -> None:
    index = Index()
    index.lookup(A, "r1", 0.0)
    index.forget_request("r1")
    index.answer([A], [False], 1.0)
    assert not index._absent and not index._asked


def test_a_check_without_end_is_a_miss() -> None:
    index = Index()
    index.lookup(A, "r1", 0.0)
    index.take_unsent()
    assert index.lookup(A, "r1", CHECK_WITHIN_S) is Lookup.RETRY
    assert index.lookup(A, "r1", CHECK_WITHIN_S + 0.1) is Lookup.MISS
    index.answer([A], [True], 99.0)
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
    index.answer([A], [True], 0.0)  # a check that was under way
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
    index.lose(A)
    index.lose(A)
    index.hear(A)  # old news
    assert index.lookup(A, "r", 0.0) is Lookup.RETRY
    index.answer(index.take_unsent(), [True], 0.0)
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
    index.answer([A], [False], 0.1)
    assert index.lookup(A, "r", 0.2) is Lookup.HIT


def told(**bounds: int) -> Index:
    index = Index(**bounds)
    index.told = True
    return index


def test_what_an_index_that_was_told_of_all_does_not_know_is_absent() -> None:
    index = told()
    index.hear(A)
    assert [index.lookup(key, "r", 0.0) for key in (A, B, C, B)] == [
        *(Lookup.HIT, Lookup.MISS, Lookup.MISS, Lookup.MISS)
    ]
    assert not index.is_awaited(B)  # nobody waits, so it is sent at the end of the step
    assert index.take_unsent() == [B, C]
    index.answer([B, C], [False, False], 0.1)
    assert index.lookup(B, "another", 0.2) is Lookup.MISS and index.take_unsent() == []
    assert index.lookup(B, "r", ABSENT_FOR_S) is Lookup.MISS and index.take_unsent() == [B]
    index.discard(A)
    assert index.lookup(A, "r", 0.2) is Lookup.MISS


def test_a_page_that_nobody_told_of_raises_doubts_for_a_while() -> None:
    index = told()
    index.lookup(A, "r1", 0.0)
    index.answer(index.take_unsent(), [True], 1.0)
    assert index.lookup(A, "r2", 1.0) is Lookup.HIT
    assert index.lookup(B, "r2", 1.0) is Lookup.RETRY
    index.answer(index.take_unsent(), [False], 1.0)
    assert index.lookup(B, "r2", 1.5) is Lookup.MISS
    assert index.lookup(C, "r2", 1.0 + DOUBT_S) is Lookup.MISS


def test_a_page_of_ones_own_store_raises_none() -> None:
    """A check may find it before the store is known to have ended."""
    for written in (True, False):
        index = Index()
        index.told = True
        assert index.lookup(A, "r", 0.0) is Lookup.MISS
        index.answer(index.take_unsent(), [True], 1.0)
        index.accept(A, written=written)
        found = index.lookup(B, "r", 2.0)
        assert found is (Lookup.MISS if written else Lookup.RETRY), "others had it before"


def test_a_page_that_was_told_of_meanwhile_raises_none() -> None:
    index = told()
    index.lookup(A, "r1", 0.0)
    index.hear(A)
    index.answer(index.take_unsent(), [True], 1.0)
    assert index.lookup(B, "r2", 1.0) is Lookup.MISS


def test_who_forgot_a_page_does_not_know_all() -> None:
    index = told(max_present=2)
    index.hear(A)
    index.hear(B)
    assert index.lookup(C, "r", 0.0) is Lookup.MISS
    index.hear(C)
    assert index.lookup(A, "r", 0.0) is Lookup.RETRY
    index.discard(B)
    assert index.lookup(A, "r", 0.0) is Lookup.RETRY  # nobody told again of A


def test_answers_at_once_end_with_what_was_told() -> None:
    index = told()
    assert index.lookup(A, "r", 0.0) is Lookup.MISS
    index.told = False
    assert index.lookup(A, "r", 0.0) is Lookup.RETRY and index.is_awaited(A)
    assert index.take_unsent() == [A]
    index.told = True
    assert index.lookup(A, "r", 0.0) is Lookup.MISS
    index.answer([A], [True], 0.1)  # as it was asked for: no doubt
    assert index.lookup(A, "r", 0.1) is Lookup.HIT and index.lookup(B, "r", 0.1) is Lookup.MISS


def test_checks_for_later_requests_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MAX_CHECKS", 2)
    index = told()
    for now in (0.0, 2 * ABSENT_FOR_S):  # no answer comes
        assert {index.lookup(key, "r", now) for key in (A, B, C)} == {Lookup.MISS}
        assert index.take_unsent() == ([] if now else [A, B])
    index.answer([A, B], [False, False], 5.0)
    assert index.lookup(C, "r", 5.0) is Lookup.MISS and index.take_unsent() == [C]


def test_a_key_is_checked_again_though_others_always_are() -> None:
    """Answers come a step later, and each step asks for a key that is new."""
    index = told()
    under_check: list[bytes] = []
    checks = 0
    for step in range(100):
        index.lookup(bytes([step]) * 4, "r", step * ABSENT_FOR_S)
        index.lookup(A, "r", step * ABSENT_FOR_S)
        keys, before = index.take_unsent(), under_check
        under_check, checks = keys, checks + (A in keys)
        index.answer(before, [False] * len(before), step * ABSENT_FOR_S)
    assert checks == 100


def test_few_keys_a_step_are_checked_for_later_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "MOST_BEHIND", 2)
    index = told()
    assert {index.lookup(key, "r", 0.0) for key in (A, B, C)} == {Lookup.MISS}
    assert index.take_unsent() == [A, B]
    assert {index.lookup(key, "r", 0.1) for key in (A, B, C)} == {Lookup.MISS}
    assert index.take_unsent() == [C]


_KEY = st.sampled_from([bytes([n]) for n in range(8)])


class ChangesOfAnIndex(RuleBasedStateMachine):
    """Whoever adds up what an index tells knows what it takes for present, each key once."""

    def __init__(self) -> None:
        super().__init__()
        self.index = Index(max_present=4, max_refused=2)
        self.believed: set[bytes] = set()
        self.anew = True

    @rule(key=_KEY, method=st.sampled_from(["hear", "accept", "add", "discard", "lose", "refuse"]))
    def happens(self, key: bytes, method: str) -> None:
        getattr(self.index, method)(key)

    @rule(key=_KEY, there=st.booleans())
    def is_checked(self, key: bytes, there: bool) -> None:
        self.index.answer([key], [there], 0.0)

    @rule()
    def forgets(self) -> None:
        self.believed.clear()
        self.anew = True

    @rule(most=st.integers(0, 3))
    def tells(self, most: int) -> None:
        changes = self.index.take_changes(most, anew=self.anew)
        self.anew = False
        for key, here in changes:
            assert here is (key not in self.believed), "a change is told once"
            (self.believed.add if here else self.believed.remove)(key)
        assert [here for _, here in changes] == sorted(here for _, here in changes)

    @rule()
    def tells_all(self) -> None:
        self.tells(99)
        assert self.believed == set(self.index._present)

    @rule(key=_KEY)
    def stores(self, key: bytes) -> None:
        self.tells(0)
        self.index.accept(key)
        self.tells(0)
        assert key in self.believed, "at once"

    @invariant()
    def little_is_kept(self) -> None:
        kept = self.index.changes
        assert len(kept._urgent) + len(kept._patient) <= 2 * 4


TestChangesOfAnIndex = ChangesOfAnIndex.TestCase
