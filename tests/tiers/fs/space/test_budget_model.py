"""Random histories of two servers on one root under a budget, against a dict."""

import os
import random
import shutil
import tempfile

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstrata.tiers.fs.scan import check_root
from kvstrata.tiers.fs.space import space as space_module
from kvstrata.tiers.fs.space.limits import file_cost
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.testing import CONTEXT, REQUEST, load, make_data, make_key, store

COSTS = {group: file_cost(CONTEXT.layouts[group].nbytes + 4096) for group in (0, 2)}
BUDGET = 40 * max(COSTS.values())
# Eviction must leave these many of the last used: 94 % of the budget less the books.
SAFE = 8

pages = st.tuples(st.integers(0, 60), st.sampled_from([0, 2]))
which = st.integers(0, 1)


class BudgetModel(RuleBasedStateMachine):
    """`recent` lists keys in the order of their last use; only those can be on the disk."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(space_module, "REPEAT_S", -1.0)
        self.patch.setattr(space_module, "TICK_S", 0.002)
        self.patch.setattr(space_module, "PROTECT_S", 0.2)
        self.root = tempfile.mkdtemp()
        self.recent: list[bytes] = []

    @initialize()
    def start(self) -> None:
        self.tiers = [self.open(), self.open()]

    def open(self) -> FsTier:
        options = {"root_dir": self.root, "n_read_threads": 1, "n_write_threads": 2}
        return FsTier({**options, "max_bytes": BUDGET}, CONTEXT)

    def used(self, key: bytes) -> None:
        if key in self.recent:
            self.recent.remove(key)
        self.recent.append(key)

    @rule(page=pages, tier=which)
    def store(self, page: tuple[int, int], tier: int) -> None:
        key = make_key(*page)
        data = make_data(page[0], CONTEXT.layouts[page[1]].nbytes)
        assert not store(self.tiers[tier], {key: data}).failed
        self.used(key)

    @rule(seed=st.integers(0, 99), tier=which)
    def store_many(self, seed: int, tier: int) -> None:
        for _ in range(20):
            chance = random.Random(seed)
            self.store((chance.randrange(61), chance.choice([0, 2])), tier)
            seed += 1

    @rule(page=pages, tier=which)
    def load(self, page: tuple[int, int], tier: int) -> None:
        key = make_key(*page)
        result, arrived = load(self.tiers[tier], [key])
        if arrived:
            assert key in self.recent
            assert arrived[key] == make_data(page[0], CONTEXT.layouts[page[1]].nbytes)
            self.used(key)
        else:
            assert set(result.failed.values()) == {"missing"}

    @rule(page=pages, tier=which)
    def touch(self, page: tuple[int, int], tier: int) -> None:
        self.tiers[tier].touch([make_key(*page)], REQUEST)  # older than its place here at most

    @rule(tier=which)
    def restart(self, tier: int) -> None:
        assert self.tiers[tier].shutdown(60.0)
        self.tiers[tier] = self.open()

    @invariant()
    def the_last_used_are_there_and_the_budget_holds(self) -> None:
        for key in self.recent[-SAFE:]:
            assert os.path.exists(self.tiers[0]._files.paths.page(key))
        found = {}
        for directory, _, names in os.walk(self.root):
            for path in (directory, *(os.path.join(directory, name) for name in names)):
                if os.path.lexists(path):
                    status = os.lstat(path)
                    found[status.st_ino] = status.st_blocks * 512
        assert sum(found.values()) <= BUDGET

    def teardown(self) -> None:
        for tier in self.tiers:
            assert tier.shutdown(60.0)
        assert check_root(self.root).bad == []
        shutil.rmtree(self.root)
        self.patch.undo()


TestBudgetModel = BudgetModel.TestCase
TestBudgetModel.settings = settings(max_examples=50, stateful_step_count=15, deadline=None)
