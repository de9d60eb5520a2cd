"""The books from outside: damage is found and mended, and beside servers nothing is damage."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstrata.tiers.fs.budget.journal import HEADER_BYTES, RECORD_BYTES, parse_name
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.fs.tools.audit import Audit, audit
from kvstrata.tiers.fs.tools.repair import examine
from kvstrata.tiers.testing import CONTEXT, load, make_data, make_key
from tests.conftest import FillRoot
from tests.sessions import kill_session
from tests.spoiling import flip
from tests.tiers.fs.budget.conftest import OpenServer
from tests.tiers.fs.budget.harness import rest
from tests.tiers.fs.budget.test_many_members import start
from tests.waiting import wait_until

PAGES = {make_key(n): make_data(n, CONTEXT.layouts[0].nbytes) for n in range(8)}


@pytest.fixture
def books(root: Path, fill_root: FillRoot) -> Path:
    """The books of a root whose servers are gone."""
    fill_root(root, PAGES, max_bytes="1GiB")
    return root / ".kvstrata"


def reasons(root: Path) -> list[str]:
    return [damage.reason for damage in audit(str(root)).damage]


def journal(books: Path) -> Path:
    return next(path for path in books.iterdir() if parse_name(path.name))


def cut_journal(books: Path) -> None:
    os.truncate(journal(books), HEADER_BYTES + RECORD_BYTES + 10)


def bad_journal_header(books: Path) -> None:
    flip(journal(books), 0)


def bad_ledger(books: Path) -> None:
    flip(books / "ledger", 20)


def fifo_ledger(books: Path) -> None:
    (books / "ledger").unlink()
    os.mkfifo(books / "ledger")


def bad_snapshot(books: Path) -> None:
    flip(books / "snapshot", -1)


def linked_snapshot(books: Path) -> None:
    (books / "snapshot").unlink()
    (books / "snapshot").symlink_to("/dev/zero")


def more_spares(books: Path) -> None:
    (books / "spare" / f"8192-{0:016x}").touch()


def no_spare_directory(books: Path) -> None:
    shutil.rmtree(books / "spare")
    (books / "spare").touch()


def forgotten_lease(books: Path) -> None:
    path = books / f"{1:032x}.server"
    path.touch()
    os.utime(path, (time.time() - 3600,) * 2)


DAMAGE = {
    cut_journal: ("journal: its end is cut off", "removed"),
    bad_journal_header: ("journal: damaged", "removed"),
    bad_ledger: ("ledger: damaged", "rebuilt"),
    fifo_ledger: ("ledger: something else is there", "removed"),
    bad_snapshot: ("snapshot: damaged", "rebuilt"),
    linked_snapshot: ("snapshot: damaged", "rebuilt"),
    more_spares: ("spare: 1 files of 8192 bytes, the ledger has 0 of 0", "rebuilt"),
    no_spare_directory: ("spare: something else is there", "removed"),
    forgotten_lease: ("lease: of a member that nobody knows", "removed"),
}


@pytest.mark.parametrize(
    ("harm", "outcome"), DAMAGE.items(), ids=[harm.__name__ for harm in DAMAGE]
)
def test_damage_is_found_and_mended(
    root: Path,
    books: Path,
    open_tier: Callable[..., FsTier],
    harm: Callable[[Path], None],
    outcome: tuple[str, str],
) -> None:
    assert reasons(root) == []
    harm(books)
    before = {path: path.lstat() for path in root.rglob("*")}
    assert outcome[0] in reasons(root)
    assert {path: path.lstat() for path in root.rglob("*")}.keys() == before.keys()
    found = examine(str(root), fix=True)
    assert outcome in [(finding.reason, finding.repair) for finding in found.findings]
    assert None not in [finding.repair for finding in found.findings]
    assert reasons(root) == []
    known = audit(str(root)).books
    assert known is not None and known.known and not known.rows
    # and a tier finds its pages
    tier = open_tier(max_bytes="1GiB")
    assert not load(tier, list(PAGES))[0].failed


def test_what_a_kill_leaves_is_no_damage(root: Path, books: Path, open_server: OpenServer) -> None:
    """It is told apart from damage, and the next server cleans it."""
    for harm in (cut_journal, more_spares, forgotten_lease):
        harm(books)
    assert all(damage.remains for damage in audit(str(root)).damage)
    bad_snapshot(books)
    kinds = {damage.reason.split(":")[0]: damage.remains for damage in audit(str(root)).damage}
    assert kinds == {"journal": True, "spare": True, "lease": True, "snapshot": False}
    server = open_server()
    rest(server)
    server.close()
    assert audit(str(root)).damage == ()


def test_a_root_without_books(root: Path) -> None:
    root.mkdir()
    assert audit(str(root)) == Audit(None, frozenset(), ())
    assert list(root.iterdir()) == []


def test_killed_servers_leave_leases(root: Path, books: Path) -> None:
    server = start(root, 1)
    try:
        wait_until(lambda: len(audit(str(root)).living) == 2)  # its I/O processes
        assert reasons(root) == []
    finally:
        kill_session(server.pid)
        server.communicate()
    wait_until(lambda: not audit(str(root)).living)
    assert "lease: of a member that was killed" in reasons(root)
    assert all(finding.remains for finding in examine(str(root), fix=False).findings)
    found = examine(str(root), fix=True)
    assert {finding.kind for finding in found.findings} <= {"books", "temporary"}
    assert None not in [finding.repair for finding in found.findings]
    assert reasons(root) == [] and not list(books.glob("*.server"))
    assert examine(str(root), fix=False).findings == []


def test_a_lease_that_is_being_made_is_left(root: Path, books: Path) -> None:
    """A server makes the file, locks it, and only then enters itself in the ledger."""
    (books / f"{1:032x}.server").touch()
    assert reasons(root) == []


def test_a_keeper_removes_forgotten_leases(books: Path, open_server: OpenServer) -> None:
    forgotten_lease(books)
    (books / f"{2:032x}.server").touch()  # a server that is just starting
    server = open_server()
    rest(server)
    left = {path.name for path in books.glob("*.server")}
    assert left == {f"{2:032x}.server", f"{server.id.hex()}.server"}


def test_beside_a_server_nothing_is_damage(
    root: Path, books: Path, open_tier: Callable[..., FsTier]
) -> None:
    open_tier(max_bytes="1GiB")
    wait_until(lambda: len(audit(str(root)).living) == 2)
    for harm in (bad_snapshot, more_spares, forgotten_lease):
        harm(books)
    found = audit(str(root))
    assert found.living and found.damage == ()
    assert examine(str(root), fix=True).findings == []


def test_what_cannot_be_mended_is_left(root: Path, books: Path) -> None:
    (books / "ledger").unlink()
    (books / "ledger").mkdir()
    (books / "ledger" / "file").touch()
    kinds = [(finding.kind, finding.repair) for finding in examine(str(root), fix=True).findings]
    assert kinds == [("books", None)] * 2  # and why not
