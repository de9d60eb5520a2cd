"""The ledger agrees with the disk, after any history."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstrata.tiers.fs.budget.keeper.rescan import Walk
from kvstrata.tiers.fs.budget.limits import BLOCK, file_cost
from kvstrata.tiers.fs.budget.names import Names
from kvstrata.tiers.fs.files.temporary import is_temporary
from kvstrata.tiers.testing import CONTEXT, make_key
from tests.spoiling import flip
from tests.tiers.fs.budget.harness import (
    Server,
    disk_usage,
    drive,
    make_quick,
    rest_driven,
)

COSTS = {group: file_cost(CONTEXT.layouts[group].nbytes + 4096) for group in (0, 2)}
BUDGET = 40 * max(COSTS.values())

numbers = st.lists(st.integers(0, 30), min_size=3, max_size=12)
groups = st.sampled_from([0, 2])
which = st.integers(0, 1)


def on_disk(root: Path) -> tuple[int, int]:
    """Bytes and files as the budget counts them, without directories."""
    walk = Walk(str(root), Names(), lambda name: False)
    pages = list(filter(None, walk.files()))
    books = [path for path in (root / ".kvstrata").rglob("*") if path.is_file()]
    spares = [path for path in books if path.parent.name == "spare"]
    nbytes = sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in set(books) - set(spares))
    nbytes += sum(file_cost(path.stat().st_size) for path in spares)
    directories = sum(
        BLOCK
        for path, _, _ in os.walk(root)
        if ".kvstrata" not in path and not path.rpartition("/")[2].endswith(("_g0", "_g2"))
    )
    nbytes += sum(cost for _, cost, _ in pages) + walk.other_bytes - directories
    return nbytes, len(pages) + walk.other_files + len(books)


class Accounts(RuleBasedStateMachine):
    """Two servers that are driven one after the other, in any order.

    In calm histories nothing happens that makes the keeper scan again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        make_quick(self.patch)
        drive(self.patch)
        self.root = Path(tempfile.mkdtemp())

    @initialize(calm=st.booleans())
    def start(self, calm: bool) -> None:
        self.calm = calm
        self.servers = [self.open(), self.open()]
        for directory in ("000", "quarantine"):  # so that directories do not come and go
            place = Path(self.servers[0].paths.pages) / directory
            place.mkdir()
            (place / "keep").mkdir()
        rest_driven(*self.servers)
        self.rest_bytes = self.ledger()[0] - on_disk(self.root)[0]  # directories

    def open(self) -> Server:
        return Server(self.root, max_bytes=BUDGET)

    def ledger(self) -> tuple[int, int]:
        with self.servers[0].books() as books:
            rows = books.rows.values()
            return (
                books.base_bytes + books.spare_bytes + sum(row.reserved_bytes for row in rows),
                books.base_files + books.spare_files + sum(row.reserved_files for row in rows),
            )

    @rule(server=which, chosen=numbers, group=groups, rewrite=st.booleans())
    def put(self, server: int, chosen: list[int], group: int, rewrite: bool) -> None:
        failed = self.servers[server].put(chosen, group, rewrite=rewrite)
        assert set(failed.values()) <= {"budget"}

    @rule(server=which, chosen=numbers, group=groups)
    def get(self, server: int, chosen: list[int], group: int) -> None:
        self.servers[server].get(chosen, group)

    @rule(server=which)
    def turn(self, server: int) -> None:
        self.servers[server].turn()

    @rule(chosen=numbers, group=groups, server=which)
    def spoil(self, chosen: list[int], group: int, server: int) -> None:
        """Pages go bad, and a server finds out."""
        for number in self.servers[0].there(chosen, group):
            flip(self.servers[0].paths.page(make_key(number, group)))
        self.servers[server].get(chosen, group)

    @rule(chosen=numbers, group=groups, server=which)
    def lose(self, chosen: list[int], group: int, server: int) -> None:
        """Somebody deletes pages, and a server finds out."""
        for number in self.servers[0].there(chosen, group):
            os.unlink(self.servers[0].paths.page(make_key(number, group)))
        self.servers[server].get(chosen, group)

    @precondition(lambda self: not self.calm)
    @rule(server=which, killed=st.booleans())
    def restart(self, server: int, killed: bool) -> None:
        self.servers[server].die() if killed else self.servers[server].leave()
        self.servers[server] = self.open()

    @precondition(lambda self: not self.calm)
    @rule(server=which, chosen=numbers, group=groups)
    def die_writing(self, server: int, chosen: list[int], group: int) -> None:
        """A server is killed with reservations, and spares in its hands."""
        for _ in chosen:
            self.servers[server].member.admission.admit(COSTS[group])
        self.restart(server, killed=True)

    @precondition(lambda self: not self.calm)
    @rule(server=which)
    def seem_dead(self, server: int) -> None:
        """A server hangs so long that it is struck from the books, and wakes up."""
        with self.servers[server].books() as books:
            books.rows.pop(self.servers[server].id, None)
        for path in self.root.glob(f".kvstrata/{self.servers[server].id.hex()}.server"):
            path.unlink()

    @precondition(lambda self: not self.calm)
    @rule()
    def lose_the_ledger(self) -> None:
        (self.root / ".kvstrata/ledger").write_bytes(b"nonsense")

    @rule()
    def agree(self) -> None:
        rest_driven(*self.servers)
        held = [path for path in (self.root / ".kvstrata").iterdir() if is_temporary(path.name)]
        for path in held:
            path.unlink()  # those of killed servers: this process lives, so nobody dared
        nbytes, files = on_disk(self.root)
        assert self.ledger() == (nbytes + self.rest_bytes, files)

    @invariant()
    def the_budget_holds(self) -> None:
        assert disk_usage(self.root)[0] <= BUDGET

    def teardown(self) -> None:
        try:
            if hasattr(self, "servers"):
                self.agree()
                for server in self.servers:
                    server.leave()
        finally:
            shutil.rmtree(self.root)
            self.patch.undo()


TestAccounts = Accounts.TestCase
TestAccounts.settings = settings(
    max_examples=settings.default.max_examples // 2, stateful_step_count=20
)
