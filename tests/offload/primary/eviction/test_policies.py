"""The policies: LRU and ARC against reference simulators, and what all must keep of pinned keys."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstrata.offload.primary.eviction.arc import ARC
from kvstrata.offload.primary.eviction.order import Use
from kvstrata.offload.primary.eviction.policies import policy_class
from kvstrata.offload.primary.eviction.policy import LRU, EvictionPolicy


class ReferenceLRU:
    """Pages in a list, the least recently used first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.pages: list[int] = []

    def request(self, page: int) -> int | None:
        """Use the page; the page that left the cache for it, if one did."""
        victim = None
        if page in self.pages:
            self.pages.remove(page)
        elif len(self.pages) == self.capacity:
            victim = self.pages.pop(0)
        self.pages.append(page)
        return victim


class ReferenceARC:
    """Megiddo and Modha, "ARC: a self-tuning, low overhead replacement cache", FAST 2003,
    figure 4, line by line; LRU pages at the front of the lists. Cases I to IV are the paper's.
    """

    def __init__(self, capacity: int) -> None:
        self.c = capacity
        self.p = 0.0
        self.t1: list[int] = []
        self.t2: list[int] = []
        self.b1: list[int] = []
        self.b2: list[int] = []

    def request(self, x: int) -> int | None:
        victim = None
        if x in self.t1 or x in self.t2:  # case I
            (self.t1 if x in self.t1 else self.t2).remove(x)
            self.t2.append(x)
        elif x in self.b1:  # case II
            delta = 1.0 if len(self.b1) >= len(self.b2) else len(self.b2) / len(self.b1)
            self.p = min(self.p + delta, float(self.c))
            victim = self.replace(x)
            self.b1.remove(x)
            self.t2.append(x)
        elif x in self.b2:  # case III
            delta = 1.0 if len(self.b2) >= len(self.b1) else len(self.b1) / len(self.b2)
            self.p = max(self.p - delta, 0.0)
            victim = self.replace(x)
            self.b2.remove(x)
            self.t2.append(x)
        else:  # case IV
            l1 = len(self.t1) + len(self.b1)
            total = l1 + len(self.t2) + len(self.b2)
            if l1 == self.c:
                if len(self.t1) < self.c:
                    self.b1.pop(0)
                    victim = self.replace(x)
                else:
                    victim = self.t1.pop(0)
            elif total >= self.c:
                if total == 2 * self.c:
                    self.b2.pop(0)
                victim = self.replace(x)
            self.t1.append(x)
        return victim

    def replace(self, x: int) -> int:
        if self.t1 and (len(self.t1) > self.p or (x in self.b2 and len(self.t1) == self.p)):
            self.b1.append(self.t1.pop(0))
            return self.b1[-1]
        self.b2.append(self.t2.pop(0))
        return self.b2[-1]


REFERENCES = {"lru": ReferenceLRU, "arc": ReferenceARC}


class Cache:
    """A policy driven by the primary tier's calls, one page after the other."""

    def __init__(self, policy: EvictionPolicy, capacity: int) -> None:
        self.policy = policy
        self.capacity = capacity
        self.resident: set[bytes] = set()

    def request(self, page: int, pinned_touch: bool) -> int | None:
        key, use = page.to_bytes(4, "big"), Use()
        there = key in self.resident
        if there and pinned_touch:  # a load
            self.policy.pin(key)
        self.policy.ask({key: 32}, use)
        if there:
            if pinned_touch:
                self.policy.unpin(key)
            return None
        victim = None
        if len(self.resident) == self.capacity:
            victim = self.policy.evict(key, 32, use, must=True)
            assert victim is not None
            self.resident.remove(victim)
        self.policy.insert(key, 32, use)
        self.resident.add(key)
        self.policy.unpin(key)
        assert self.policy.idle() == len(self.resident)
        return None if victim is None else int.from_bytes(victim, "big")


# Few pages and loops make ghost hits and all four of ARC's cases common.
traces = st.lists(
    st.one_of(
        st.lists(st.integers(0, 5), min_size=1, max_size=4),
        st.lists(st.integers(0, 30), min_size=1, max_size=8),
        st.integers(1, 15).map(lambda n: list(range(n))),
    ),
    max_size=40,
).map(lambda runs: [page for run in runs for page in run])


@pytest.mark.parametrize("name", ["arc", "lru"])
@given(capacity=st.integers(1, 8), trace=traces, pinned_touch=st.booleans())
def test_every_eviction_agrees_with_the_reference(
    name: str, capacity: int, trace: list[int], pinned_touch: bool
) -> None:
    cache = Cache(policy_class(name)(capacity, {}), capacity)
    reference = REFERENCES[name](capacity)
    for step, page in enumerate(trace):
        expected = reference.request(page)
        assert cache.request(page, pinned_touch) == expected, f"step {step}, page {page}"


def test_the_reference_trace_reaches_all_of_arc() -> None:
    """A fixed trace on which ghosts of both kinds hit, and ARC and LRU part ways."""
    trace = [1, 2, 1, 3, 4, 5, 2, 1, 6, 7, 3, 2, 8, 9, 1, 4, 2, 6, 7, 1, 2, 3] * 3
    arc, lru = Cache(ARC(4, {}), 4), Cache(LRU(4, {}), 4)
    reference = ReferenceARC(4)
    seen: Counter[str] = Counter()
    for page in trace:
        for name in ("b1", "b2"):
            seen[name] += page in getattr(reference, name)
        expected = reference.request(page)
        seen["differs"] += lru.request(page, True) != expected
        assert arc.request(page, True) == expected
    assert min(seen["b1"], seen["b2"], seen["differs"]) > 0, seen


def test_arc_resists_a_scan() -> None:
    """What ARC is for: pages used twice survive a long run of pages used once."""
    for name, survives in (("arc", True), ("lru", False)):
        cache = Cache(policy_class(name)(4, {}), 4)
        for page in (1, 2, 1, 2, *range(100, 200)):
            cache.request(page, pinned_touch=True)
        assert ((1).to_bytes(4, "big") in cache.resident) == survives


class PolicyMachine(RuleBasedStateMachine):
    """Any order of calls that the primary tier may make, against sets of keys."""

    name = ""

    @initialize(capacity=st.integers(1, 5))
    def start(self, capacity: int) -> None:
        self.capacity = capacity
        self.policy: EvictionPolicy = policy_class(self.name)(capacity, {})
        self.idle: set[bytes] = set()
        self.pinned: set[bytes] = set()
        self.uses = [Use() for _ in range(3)]

    def resident(self) -> set[bytes]:
        return self.idle | self.pinned

    @rule(
        number=st.integers(0, 9),
        use=st.integers(0, 2),
        end_token=st.integers(1, 9),
        must=st.booleans(),
    )
    def bring(self, number: int, use: int, end_token: int, must: bool) -> None:
        key = bytes([number])
        if key in self.resident():
            return
        if len(self.resident()) == self.capacity and not self.idle:
            return
        self.policy.ask({key: end_token}, self.uses[use])
        if len(self.resident()) == self.capacity:
            victim = self.policy.evict(key, end_token, self.uses[use], must=must)
            if victim is None:
                assert not must, "nothing was evicted for a page that must be stored"
                return
            assert victim in self.idle, "a pinned or absent key was evicted"
            self.idle.remove(victim)
        self.policy.insert(key, end_token, self.uses[use])
        self.pinned.add(key)

    @precondition(lambda self: self.idle)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.idle)))
        self.policy.pin(key)
        self.idle.remove(key)
        self.pinned.add(key)

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.pinned)))
        self.policy.unpin(key)
        self.pinned.remove(key)
        self.idle.add(key)

    @precondition(lambda self: self.idle or self.pinned)
    @rule(data=st.data(), use=st.integers(0, 2))
    def ask(self, data: st.DataObject, use: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.resident())))
        self.uses[use].see({key: 5})
        self.policy.ask({key: 5}, self.uses[use])

    @rule(use=st.integers(0, 2))
    def end_request(self, use: int) -> None:
        self.uses[use].renew()
        self.policy.ended(self.uses[use])
        self.uses[use] = Use()

    @precondition(lambda self: self.idle or self.pinned)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.resident())))
        self.policy.remove(key)
        self.idle.discard(key)
        self.pinned.discard(key)

    @rule()
    def clear(self) -> None:
        self.policy.clear()
        self.idle.clear()
        self.pinned.clear()

    @invariant()
    def idle_is_counted(self) -> None:
        if hasattr(self, "policy"):
            assert self.policy.idle() == len(self.idle)

    @precondition(lambda self: not self.idle)
    @rule()
    def nothing_to_evict(self) -> None:
        assert self.policy.evict(b"new", 1, Use(), must=True) is None

    def teardown(self) -> None:
        """Everything idle can be evicted, each key once."""
        if hasattr(self, "policy"):
            evicted = {self.policy.evict(b"new", 1, Use(), must=True) for _ in set(self.idle)}
            assert evicted == self.idle
            assert self.policy.idle() == 0


class LRUMachine(PolicyMachine):
    name = "lru"


class ARCMachine(PolicyMachine):
    name = "arc"

    @invariant()
    def lists_are_bounded(self) -> None:
        """The paper's invariants, figure 3: |L1| <= c and |L1| + |L2| <= 2c."""
        if isinstance(getattr(self, "policy", None), ARC):
            one = self.policy._t1.size + len(self.policy._b1)
            two = self.policy._t2.size + len(self.policy._b2)
            assert one <= self.capacity
            assert one + two <= 2 * self.capacity
            assert self.policy._t1.size + self.policy._t2.size == len(self.resident())


class AutoMachine(PolicyMachine):
    name = "auto"

    @rule(share=st.sampled_from([0.05, 0.6, 1.0]))
    def choose(self, share: float) -> None:
        """What the shadows tell, at any time."""
        self.policy.share = share  # type: ignore[attr-defined]


TestLRUMachine = LRUMachine.TestCase
TestARCMachine = ARCMachine.TestCase
TestAutoMachine = AutoMachine.TestCase


def test_a_policy_of_your_own_is_named_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_policy.py").write_text(
        "from kvstrata.offload.primary.eviction.policy import LRU, EvictionPolicy\n"
        "class Mine(LRU): ...\n"
        "class Half(EvictionPolicy): ...\n"
        "class Other: ...\n"
        "thing = 3\n"
    )
    (tmp_path / "broken_policy.py").write_text("raise RuntimeError('no such file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(policy_class("own_policy:Mine")(4, {}), LRU)
    for name, reason in {
        "own_policy:Half": "lacks __init__, ask, clear.*give",
        "own_policy:Other": "derived from kvstrata.offload.primary.eviction.policy:EvictionPolicy",
        "own_policy:thing": "derived from",
        "own_policy:Absent": "AttributeError.*give a module",
        "absent_policy:Mine": "ModuleNotFoundError.*give a module",
        "broken_policy:Mine": "RuntimeError: no such file.*give a module",
        "own_policy": 'give one of auto, lru, arc, or "package.module:Class"',
        ":Mine": "give one of",
        "own_policy:": "give one of",
    }.items():
        with pytest.raises(ValueError, match=f"^eviction_policy: '{name}'.*{reason}"):
            policy_class(name)
