"""News of pages: what a server hears of the others, and what reaches the engine's index."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.tiers.base import Lookup, RequestView
from kvstrata.tiers.fs.budget import snapshot
from kvstrata.tiers.fs.budget.catalog import Catalog
from kvstrata.tiers.fs.budget.journal import (
    HEADER_BYTES,
    RECORD_BYTES,
    Journal,
    Op,
    Record,
    evicted_key,
    journal_name,
)
from kvstrata.tiers.fs.budget.limits import Limits
from kvstrata.tiers.fs.budget.names import Names
from kvstrata.tiers.fs.budget.tail import Tail
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.process.medium import News
from kvstrata.tiers.testing import make_data, make_key, store
from tests.tiers.fs.budget.conftest import OpenServer
from tests.tiers.fs.budget.harness import BUDGET, COST, GROUP, SIZE, rest_driven
from tests.waiting import wait_until

OURS, OTHER, THIRD = bytes(16), bytes(range(16)), bytes([255] * 16)
SPACE, ELSEWHERE = "org_model_0123456789ab", "other_model_ba9876543210"
KEYS = [make_key(n) for n in range(200)]


def stored(numbers: range) -> list[Record]:
    return [Record(Op.STORED, KEYS[n], 2) for n in numbers]


def there(numbers: range) -> list[News]:
    return [(KEYS[n], True) for n in numbers]


@pytest.fixture
def tail(tmp_path: Path) -> Tail:
    return Tail(str(tmp_path), OURS, SPACE)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(str(tmp_path), OTHER, SPACE, 0o600, 10 * RECORD_BYTES)


def hear(tail: Tail) -> list[News]:
    found: list[News] = []
    while news := tail.news(30):
        found += news
    return found


def test_first_the_snapshot_then_the_journals(tmp_path: Path, tail: Tail, journal: Journal) -> None:
    catalog, names = Catalog(), Names([ELSEWHERE, SPACE])
    for number in range(100):
        catalog.add(b"\0\1" + KEYS[number], 4096, 1000 - number)
        catalog.add(b"\0\0" + KEYS[100 + number], 4096, 1000 - number)
    journal.append(stored(range(100)))
    read = {OTHER: journal.end}
    snapshot.save(str(tmp_path), catalog, names, read, 0o600)
    journal.append(stored(range(100, 110)))
    assert tail.news(30) == there(range(100))[:-31:-1]  # the least recently used first
    assert hear(tail) == [*there(range(70))[::-1], *there(range(100, 110))]
    assert hear(tail) == []


def test_all_files_of_all_journals(tmp_path: Path, tail: Tail, journal: Journal) -> None:
    third = Journal(str(tmp_path), THIRD, SPACE, 0o600, 2**20)
    heard: list[News] = []
    for start in range(0, 100, 10):  # each a file of its own
        journal.append(stored(range(start, start + 10)))
        third.append(stored(range(100 + start, 110 + start)))
        if start % 40 == 0:
            heard += hear(tail)
    heard += hear(tail)
    assert len(list(tmp_path.glob(f"{OTHER.hex()}.*"))) == 10
    for base in (0, 100):
        assert [n for n in heard if n[0] in KEYS[base : base + 100]] == there(
            range(base, base + 100)
        )


def test_what_comes_and_goes(tmp_path: Path, tail: Tail, journal: Journal) -> None:
    elsewhere = Journal(str(tmp_path), THIRD, ELSEWHERE, 0o600, 2**20)
    own = Journal(str(tmp_path), OURS, SPACE, 0o600, 2**20)
    own.append(stored(range(50, 60)))  # the engine knows
    elsewhere.append(stored(range(60, 70)))
    assert hear(tail) == []
    elsewhere.append([Record(Op.EVICTED, evicted_key(SPACE, KEYS[1]))])  # by the keeper there
    elsewhere.append([Record(Op.EVICTED, evicted_key(ELSEWHERE, KEYS[2]))])
    elsewhere.append([Record(Op.GONE, KEYS[2])])
    journal.append([Record(op, KEYS[3]) for op in (Op.USED, Op.PROMISED, Op.STORED, Op.GONE)])
    journal.append([Record(Op.QUARANTINED, b"")])
    assert sorted(hear(tail)) == sorted([(KEYS[1], False), (KEYS[3], True), (KEYS[3], False)])


def test_files_that_the_keeper_deletes(tmp_path: Path, tail: Tail, journal: Journal) -> None:
    journal.append(stored(range(10)))
    assert hear(tail) == there(range(10))
    journal.append(stored(range(10, 20)))
    (tmp_path / journal_name(OTHER, 1)).unlink()
    journal.append(stored(range(20, 30)))
    assert hear(tail) == there(range(10, 30))
    for path in tmp_path.iterdir():
        path.unlink()
    assert hear(tail) == [] and tail._read == {}
    journal.append(stored(range(30, 40)))  # goes on in a new file
    assert hear(tail) == there(range(30, 40))


def save(tmp_path: Path, numbers: range, read: dict[bytes, tuple[int, int]]) -> None:
    catalog, names = Catalog(), Names([SPACE])
    for number in numbers:
        catalog.add(b"\0\0" + KEYS[number], 4096, 1000 + number)
    snapshot.save(str(tmp_path), catalog, names, read, 0o600)


@pytest.mark.parametrize("what", ["rotated", "left", "came and left"])
def test_a_journal_that_was_deleted_unread_is_in_the_snapshot(
    tmp_path: Path, tail: Tail, journal: Journal, what: str
) -> None:
    """The engine was idle, so nobody read on, and the keeper deletes what a snapshot covers."""
    save(tmp_path, range(0), {})
    assert hear(tail) == [] and tail.at_end and tail.whole
    if what != "came and left":
        journal.append(stored(range(5)))
        assert hear(tail) == there(range(5))
    journal.append(stored(range(5, 15)))
    save(tmp_path, range(15), {OTHER: journal.end})
    number = journal.end[0]
    journal.append(stored(range(15, 20)))
    assert journal.end[0] > number
    (tmp_path / journal_name(OTHER, number)).unlink()
    if what != "rotated":
        (tmp_path / journal_name(OTHER, journal.end[0])).unlink()
        save(tmp_path, range(20), {OTHER: journal.end})
    heard = hear(tail)
    if not heard:  # it begins anew, and says so
        assert not tail.whole
        heard = hear(tail)
    assert set(heard) == set(there(range(20))) and tail.at_end and tail.whole
    for _ in range(3):
        assert hear(tail) == [] and tail.at_end and tail.whole


def test_hostile_journals(tmp_path: Path, tail: Tail, journal: Journal) -> None:
    names = [journal_name(bytes([n] * 16), 1) for n in range(1, 7)]
    os.symlink("/etc/passwd", tmp_path / names[0])
    os.mkfifo(tmp_path / names[1])
    (tmp_path / names[2]).mkdir()
    (tmp_path / names[3]).write_bytes(b"\xff" * 10_000)
    (tmp_path / names[4]).write_bytes(b"")
    with open(tmp_path / names[5], "wb") as file:
        file.truncate(2**20)  # zeros
    journal.append(stored(range(10)))
    path = tmp_path / journal_name(OTHER, 1)
    raw = bytearray(path.read_bytes())
    raw[HEADER_BYTES + RECORD_BYTES] ^= 1  # the second record
    path.write_bytes(raw + b"torn")
    expected = there(range(10))
    del expected[1]
    heard: list[News] = []
    for _ in range(40):  # each call ends
        heard += tail.news(100)
    assert heard == expected


@given(raw=st.binary(max_size=HEADER_BYTES + 3 * RECORD_BYTES), whole=st.booleans())
def test_any_bytes_are_a_journal(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, whole: bool
) -> None:
    directory = tmp_path_factory.getbasetemp() / "any"
    directory.mkdir(exist_ok=True)
    path = directory / journal_name(OTHER, 1)
    path.unlink(missing_ok=True)
    if whole:
        Journal(str(directory), OTHER, SPACE, 0o600, 2**20).append(stored(range(1)))
        raw = path.read_bytes() + raw
    path.write_bytes(raw)
    heard = Tail(str(directory), OURS, SPACE).news(100)
    assert heard == (there(range(1)) if whole else [])


OpenTier = Callable[..., FsTier]


def answer_of(tier: FsTier, number: int, expected: Lookup) -> None:
    """Wait until the index gives this answer, without asking the disk."""
    deadline = time.monotonic() + 60.0
    while number_known(tier, number) != (expected is Lookup.HIT):
        assert time.monotonic() < deadline
        tier.get_finished()
        time.sleep(0.005)
    if expected is Lookup.HIT:
        assert tier.lookup(make_key(number, GROUP), RequestView("new")) is Lookup.HIT
        tier._promised.clear()


def number_known(tier: FsTier, number: int) -> bool:
    return bool(tier._index.touch([make_key(number, GROUP)]))


def test_news_reach_the_index_of_another_engine(open_tier: OpenTier) -> None:
    first, second = open_tier(max_bytes=30 * COST), open_tier(max_bytes=30 * COST)
    data = {make_key(n, GROUP): make_data(n, SIZE) for n in range(60)}
    assert not store(first, dict(list(data.items())[:10])).failed
    for number in range(10):
        answer_of(second, number, Lookup.HIT)
    told = [dict(tier.take_changes(99)) for tier in (first, second)]
    assert told == [{make_key(n, GROUP): True for n in range(10)}] * 2
    for start in range(10, 60, 5):
        assert not store(first, dict(list(data.items())[start : start + 5])).failed
    gone = [n for n in range(10) if not os.path.exists(first.paths[0].page(make_key(n, 2)))]
    assert len(gone) == 10
    for tier in (first, second):  # one of them keeps the books
        for number in gone:
            answer_of(tier, number, Lookup.MISS)
        assert {(make_key(n, GROUP), False) for n in gone} <= set(tier.take_changes(99))


def test_a_restarted_engine_knows_its_pages(open_tier: OpenTier) -> None:
    tier = open_tier()
    data = {make_key(n, GROUP): make_data(n, SIZE) for n in range(20)}
    assert not store(tier, data).failed
    assert tier.shutdown(60.0)
    tier = open_tier()
    for number in range(20):
        answer_of(tier, number, Lookup.HIT)


def test_an_engine_that_is_behind_hears_of_it_later(open_driven: OpenServer) -> None:
    first, second = open_driven(max_bytes="1GiB"), open_driven(max_bytes="1GiB")
    rest_driven(first, second)
    second.is_behind = True
    first.put(range(5))
    rest_driven(first, second)
    assert second.news == []
    second.is_behind = False
    rest_driven(first, second)
    assert second.news == [(make_key(n, GROUP), True) for n in range(5)]
    first.leave()
    second.leave()


def test_a_keeper_that_is_behind_says_later_what_it_did(open_driven: OpenServer) -> None:
    server = open_driven(max_bytes=BUDGET)
    rest_driven(server)
    assert server.put(range(60)) == {}
    rest_driven(server)
    server.is_behind = True
    with server.books() as books:
        books.rows[server.id].limits = Limits(max_files=30)
    rest_driven(server)
    assert 0 < len(server.there(range(60))) <= 30
    assert server.news == [] and not server.done
    server.is_behind = False
    rest_driven(server)
    assert server.done["evicted_pages"] >= 30
    server.leave()


def test_books_that_cannot_be_read_are_not_complete(
    open_server: OpenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = open_server(max_bytes=BUDGET)
    wait_until(lambda: server.is_complete)

    def fail(tail: Tail, most: int) -> list[News]:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Tail, "news", fail)
    wait_until(lambda: not server.is_complete)
    monkeypatch.undo()
    wait_until(lambda: server.is_complete)
