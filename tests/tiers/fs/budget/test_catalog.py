"""The catalog against a dict."""

import tracemalloc

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstrata.tiers.fs.budget.catalog import Catalog
from kvstrata.tiers.fs.budget.limits import BLOCK

names = st.integers(0, 20).map(lambda n: n.to_bytes(2, "big"))
costs = st.integers(1, 5).map(lambda n: n * BLOCK)
depths = st.integers(0, 3)


class CatalogModel(RuleBasedStateMachine):
    """`files` maps names to [cost, stamp, depth]; `fresh` are those of the scan under way."""

    def __init__(self) -> None:
        super().__init__()
        self.catalog = Catalog()
        self.files: dict[bytes, list[int]] = {}
        self.fresh: set[bytes] | None = None
        self.clock = 1000

    def note(self, name: bytes) -> None:
        if self.fresh is not None:
            self.fresh.add(name)

    @rule(name=names, cost=costs, depth=depths, tick=st.booleans())
    def add(self, name: bytes, cost: int, depth: int, tick: bool) -> None:
        self.clock += tick
        old = self.files.get(name, [0, 0, 0])
        assert self.catalog.add(name, cost, self.clock, depth) == cost - old[0]
        self.files[name] = [cost, self.clock, depth or old[2]]
        self.note(name)

    @rule(name=names, cost=costs, age=st.integers(0, 500))
    def seen(self, name: bytes, cost: int, age: int) -> None:
        self.catalog.seen(name, cost, self.clock - age)
        old = self.files.get(name, [0, self.clock - age, 0])
        self.files[name] = [cost, old[1], old[2]]
        self.note(name)

    @rule(chosen=st.lists(names, max_size=5), depth=depths)
    def use(self, chosen: list[bytes], depth: int) -> None:
        self.clock += 1
        for name in chosen:
            self.catalog.use(name, self.clock, depth)
            if name in self.files:
                self.files[name][1] = self.clock
                self.files[name][2] = depth or self.files[name][2]

    @rule(name=names)
    def remove(self, name: bytes) -> None:
        assert self.catalog.remove(name) == self.files.pop(name, [0])[0]

    @rule(spared=st.sets(names, max_size=3), evict=st.booleans())
    def take_victim(self, spared: set[bytes], evict: bool) -> None:
        victim = self.catalog.take_victim(spared.__contains__)
        candidates = {name: file for name, file in self.files.items() if name not in spared}
        if victim is None:
            assert not candidates
            return
        order = {name: (stamp, -depth) for name, (_, stamp, depth) in candidates.items()}
        assert order[victim][0] == min(order.values())[0]
        if evict:
            assert self.catalog.remove(victim) == self.files.pop(victim)[0]
        else:
            # what was taken and stayed is out of the queue until it is used
            self.use([victim], 0)

    @rule()
    def scan(self) -> None:
        if self.fresh is None:
            self.fresh = set()
            self.catalog.begin_scan()
        else:
            lost = set(self.files) - self.fresh
            assert self.catalog.end_scan() == len(lost)
            for name in lost:
                del self.files[name]
            self.fresh = None

    @invariant()
    def the_totals_agree(self) -> None:
        assert len(self.catalog) == len(self.files)
        assert self.catalog.nbytes == sum(cost for cost, _, _ in self.files.values())
        assert self.catalog.newest() == max((f[1] for f in self.files.values()), default=0)
        for name, (cost, _, _) in self.files.items():
            assert name in self.catalog and self.catalog.cost(name) == cost


TestCatalog = CatalogModel.TestCase
TestCatalog.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_deepest_of_one_access_goes_first() -> None:
    catalog = Catalog()
    for number, depth in enumerate([16, 64, 32, 48]):
        catalog.add(bytes([number]), BLOCK, 5, depth)
    catalog.add(b"older", BLOCK, 4, 1)
    order = []
    while (name := catalog.take_victim(lambda _: False)) is not None:
        order.append(name)
        catalog.remove(name)
    assert order == [b"older", b"\1", b"\3", b"\2", b"\0"]


def test_positions_are_used_again() -> None:
    catalog = Catalog()
    for number in range(10_000):
        catalog.add(number.to_bytes(4, "big"), BLOCK, number)
        if number >= 100:
            assert catalog.take_victim(lambda _: False) == (number - 100).to_bytes(4, "big")
            catalog.remove((number - 100).to_bytes(4, "big"))
    assert len(catalog) == 100 and len(catalog._names) == 101


def test_memory_per_file() -> None:
    count = 50_000
    tracemalloc.start()
    try:
        catalog = Catalog()
        for number in range(count):
            catalog.add(number.to_bytes(38, "big"), 2**21, number)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used / count < 250
