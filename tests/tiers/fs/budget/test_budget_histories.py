"""Random histories of two servers on one root under a budget, against a list of uses."""

import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstrata.tiers.fs.budget.limits import file_cost
from kvstrata.tiers.fs.tools.scan import check_root
from kvstrata.tiers.testing import CONTEXT, make_key
from tests.tiers.fs.budget.harness import Server, disk_usage, drive, make_quick

COSTS = {group: file_cost(CONTEXT.layouts[group].nbytes + 4096) for group in (0, 2)}
BUDGET = 40 * max(COSTS.values())
# Eviction must leave these many of the last used: 94 % of the budget less the books.
SAFE = 8

Page = tuple[int, int]  # number and group
pages = st.tuples(st.integers(0, 60), st.sampled_from([0, 2]))
which = st.integers(0, 1)


class BudgetModel(RuleBasedStateMachine):
    """`recent` lists pages in the order of their last use; only those can be on the disk."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        make_quick(self.patch)
        drive(self.patch)
        self.root = Path(tempfile.mkdtemp())
        self.recent: list[Page] = []

    @initialize()
    def start(self) -> None:
        self.servers = [self.open(), self.open()]

    def open(self) -> Server:
        return Server(self.root, max_bytes=BUDGET)

    def turn(self) -> None:
        for server in self.servers:
            server.turn()

    def used(self, page: Page) -> None:
        if page in self.recent:
            self.recent.remove(page)
        self.recent.append(page)

    @rule(page=pages, server=which)
    def store(self, page: Page, server: int) -> None:
        for _ in range(100):
            failed = self.servers[server].put([page[0]], page[1])
            self.turn()
            if not failed:
                break
        assert not failed
        self.used(page)

    @rule(seed=st.integers(0, 99), server=which)
    def store_many(self, seed: int, server: int) -> None:
        for _ in range(20):
            chance = random.Random(seed)
            self.store((chance.randrange(61), chance.choice([0, 2])), server)
            seed += 1

    @rule(page=pages, server=which)
    def load(self, page: Page, server: int) -> None:
        if self.servers[server].get([page[0]], page[1]):
            assert page in self.recent
            self.used(page)
        self.turn()

    @rule(page=pages, server=which)
    def use(self, page: Page, server: int) -> None:
        self.servers[server].use([page[0]], page[1])  # older than its place here at most

    @rule(server=which)
    def restart(self, server: int) -> None:
        self.servers[server].leave()
        self.servers[server] = self.open()

    @invariant()
    def the_last_used_are_there_and_the_budget_holds(self) -> None:
        for number, group in self.recent[-SAFE:]:
            assert os.path.exists(self.servers[0].paths.page(make_key(number, group)))
        assert disk_usage(self.root)[0] <= BUDGET

    def teardown(self) -> None:
        try:
            for server in self.servers:
                server.leave()
                assert server.failures.keys() <= {"missing", "budget"}
            assert check_root(str(self.root)).bad == []
        finally:
            shutil.rmtree(self.root)
            self.patch.undo()


TestBudgetModel = BudgetModel.TestCase
TestBudgetModel.settings = settings(
    max_examples=settings.default.max_examples // 2, stateful_step_count=15
)
