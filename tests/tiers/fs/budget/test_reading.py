"""The one reader of journals: every record once, in its journal's order, whatever the files are."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.tiers.fs.budget import journal as journal_module
from kvstrata.tiers.fs.budget.journal import (
    HEADER_BYTES,
    RECORD_BYTES,
    Journal,
    Op,
    Positions,
    Record,
    journal_name,
    journals,
    read_on,
    unread,
)
from kvstrata.tiers.fs.budget.keeper.inventory import Inventory
from kvstrata.tiers.fs.budget.keeper.replay import Replay
from kvstrata.tiers.fs.budget.ledger import Ledger
from kvstrata.tiers.testing import make_key

MEMBERS = bytes([1] * 16), bytes([2] * 16)
NAMESPACE = "org_model_0123456789ab"


def records(numbers: range) -> list[Record]:
    return [Record(Op.STORED, make_key(n), 2) for n in numbers]


def read_some(directory: Path, read: Positions, found: dict[bytes, list[Record | None]]) -> bool:
    """Go once over all journals; whether anything was there."""
    some = False
    for member, piece in unread(str(directory), journals(str(directory)), read):
        assert piece.namespace == NAMESPACE and piece.records
        found[member] += piece.records
        read[member] = piece.end
        some = True
    return some


@given(
    steps=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 30), st.booleans()), max_size=12),
    piece=st.integers(1, 12),
)
def test_each_record_is_read_once_and_in_order(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int, bool]], piece: int
) -> None:
    directory = tmp_path_factory.mktemp("books")
    writers = [Journal(str(directory), m, NAMESPACE, 0o600, 20 * RECORD_BYTES) for m in MEMBERS]
    written: dict[bytes, list[Record | None]] = {member: [] for member in MEMBERS}
    found: dict[bytes, list[Record | None]] = {member: [] for member in MEMBERS}
    read: Positions = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal_module, "_READ_BYTES", piece * RECORD_BYTES)
        for who, count, look in steps:
            start = len(written[MEMBERS[who]])
            more = records(range(start, start + count))
            writers[who].append(more)
            written[MEMBERS[who]] += more
            if look:
                read_some(directory, read, found)
        while read_some(directory, read, found):
            pass
    assert found == written


def test_the_keeper_misses_nothing_of_a_journal_that_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is far behind, and the member has begun its next journal meanwhile."""
    ledger = Ledger(str(tmp_path), 0o600, 0o700, MEMBERS[0])
    with ledger.locked() as books:
        books.keeper = MEMBERS[0]
    monkeypatch.setattr(journal_module, "_READ_BYTES", 10 * RECORD_BYTES)
    writer = Journal(ledger.directory, MEMBERS[1], NAMESPACE, 0o600, 50 * RECORD_BYTES)
    for start in range(0, 180, 60):
        writer.append(records(range(start, start + 60)))
    assert len(journals(ledger.directory)) == 3
    inventory = Inventory(ledger, {})
    replay = Replay(inventory)
    while replay.advance():
        pass
    assert len(inventory.catalog) == 180 and inventory.read == {MEMBERS[1]: writer.end}
    ledger.close()


def test_what_is_left_of_a_journal(tmp_path: Path) -> None:
    path = tmp_path / journal_name(MEMBERS[0], 1)
    Journal(str(tmp_path), MEMBERS[0], NAMESPACE, 0o600, 2**20).append(records(range(3)))
    raw, whole = path.read_bytes(), (1, HEADER_BYTES + 3 * RECORD_BYTES)
    piece = read_on(str(tmp_path), MEMBERS[0], 1, {})
    assert piece is not None and (piece.end, piece.rest, piece.is_last) == (whole, 0, True)
    assert piece.mtime == path.stat().st_mtime
    path.write_bytes(raw[:-1])
    piece = read_on(str(tmp_path), MEMBERS[0], 1, {})
    assert piece is not None and len(piece.records) == 2 and piece.rest == RECORD_BYTES - 1
    path.write_bytes(raw[: HEADER_BYTES - 1])
    piece = read_on(str(tmp_path), MEMBERS[0], 1, {})
    assert piece is not None and (piece.namespace, piece.records, piece.rest) == (None, [], -1)
    for position in ((1, 10**30), (2, 0)):  # a hostile snapshot, and one that is further
        assert list(unread(str(tmp_path), [(MEMBERS[0], 1)], {MEMBERS[0]: position})) == []
    assert read_on(str(tmp_path), MEMBERS[0], 1, {MEMBERS[0]: (2, 0)}) is None
    os.truncate(path, 2**28 + 1)  # no member writes that much
    assert read_on(str(tmp_path), MEMBERS[0], 1, {}) is None
