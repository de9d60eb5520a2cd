"""What is on the disk: ledger, journals, snapshot. Damaged or hostile, it is ignored."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.tiers.fs.budget import journal, snapshot
from kvstrata.tiers.fs.budget.catalog import Catalog
from kvstrata.tiers.fs.budget.journal import HEADER_BYTES, RECORD_BYTES, Journal, Op, Record, decode
from kvstrata.tiers.fs.budget.lease import Lease, Watch
from kvstrata.tiers.fs.budget.ledger import Books, Ledger, Row
from kvstrata.tiers.fs.budget.limits import BLOCK, Limits
from kvstrata.tiers.fs.budget.names import Names
from kvstrata.tiers.fs.files.layout import page_location
from kvstrata.tiers.testing import make_key

MEMBER = bytes(range(16))
SPACE = "org_model_0123456789ab"

records = st.builds(
    Record,
    op=st.sampled_from(list(Op)),
    key=st.binary(max_size=68),
    blocks=st.integers(0, 2**32 - 1),
    access=st.integers(0, 2**32 - 1),
    depth=st.integers(0, 2**32 - 1),
)


@given(st.lists(records, max_size=5), st.binary(max_size=RECORD_BYTES - 1))
def test_records_come_back(written: list[Record], rest: bytes) -> None:
    assert list(decode(b"".join(r.encode() for r in written) + rest)) == written


@given(records, records, st.integers(0, RECORD_BYTES - 1), st.integers(1, 255))
def test_a_damaged_record_costs_only_itself(a: Record, b: Record, at: int, flip: int) -> None:
    raw = bytearray(a.encode())
    raw[at] ^= flip
    assert list(decode(bytes(raw) + b.encode())) == [None, b]


@given(st.binary(max_size=3 * RECORD_BYTES))
def test_any_bytes_are_a_journal(raw: bytes) -> None:
    assert len(list(decode(raw))) == len(raw) // RECORD_BYTES
    journal.read_namespace(raw)


def test_a_journal_goes_on_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = Journal(str(tmp_path), MEMBER, SPACE, 0o600, 2**18)
    entries = [Record(Op.USED, make_key(n)) for n in range(3)]
    written.append(entries[:1])
    real = os.pwrite

    def half(fd: int, content: bytes, position: int) -> int:
        real(fd, content[: len(content) // 2], position)
        raise OSError(28, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", half)
        with pytest.raises(OSError, match="full"):
            written.append(entries[1:])
    written.append(entries[1:])
    raw = (tmp_path / journal.journal_name(MEMBER, 1)).read_bytes()
    assert journal.read_namespace(raw) == SPACE
    assert list(decode(raw[HEADER_BYTES:])) == entries
    assert written.end == (1, len(raw))


def test_a_long_journal_goes_on_in_another_file(tmp_path: Path) -> None:
    written = Journal(str(tmp_path), MEMBER, SPACE, 0o640, 2**18)
    for number in range(4):
        written.append([Record(Op.USED, make_key(number))] * 2000)
    found = sorted(os.listdir(tmp_path))
    assert [journal.parse_name(name) for name in found] == [(MEMBER, 1), (MEMBER, 2)]
    assert sum((tmp_path / n).stat().st_size for n in found) == 8000 * RECORD_BYTES + 2 * 168
    assert (tmp_path / found[0]).stat().st_mode & 0o777 == 0o640


def test_a_journal_that_was_deleted_leaves_no_empty_one(tmp_path: Path) -> None:
    books = tmp_path / "books"
    books.mkdir()
    written = Journal(str(books), MEMBER, SPACE, 0o600, 2**18)
    entries = [Record(Op.USED, make_key(n)) for n in range(3)]
    written.append(entries[:1])
    shutil.rmtree(books)
    with pytest.raises(FileNotFoundError):
        written.append(entries[1:])
    books.mkdir()
    written.append(entries[1:2])
    written.append(entries[2:])
    (name,) = os.listdir(books)
    raw = (books / name).read_bytes()
    assert list(decode(raw[HEADER_BYTES:])) == entries[1:]
    assert written.end == (2, len(raw)) and journal.parse_name(name) == (MEMBER, 2)
    (books / name).unlink()
    written.append(entries[:1])
    assert os.listdir(books) == [journal.journal_name(MEMBER, 3)]


def test_names_and_paths() -> None:
    names = Names()
    key = make_key(5, group=2)
    parts = [f"{SPACE}_r0", *page_location(key).split("/")]
    name = names.name(parts)
    assert name is not None and name[2:] == key
    assert names.path(name) == "/".join(parts) and names.namespace(name) == SPACE
    bad = [f"{SPACE}_r0", "quarantine", "1-size-x.safetensors"]
    other = names.name(bad)
    assert other is not None and names.path(other) == "/".join(bad)
    assert names.namespace(other) is None
    for strange in (
        [SPACE, *parts[1:]],
        [parts[0], "fff", *parts[2:]],
        [*parts[:3], "0g.safetensors"],
        [*parts[:3], "00.safetensors"],
        [*parts[:3], parts[3].upper()],
        [f"{SPACE}_r0", "config.json"],
        ["evil name_0123456789ab_r0", *parts[1:]],
    ):
        assert names.name(strange) is None
    for hostile in (b"\0\7" + key, b"", b"\0\0", b"\xff\xff../../etc/passwd", b"\0\0" + b"x" * 99):
        assert names.path(hostile) is None


def filled() -> tuple[Catalog, Names]:
    catalog, names = Catalog(), Names([SPACE])
    for number in range(1000):
        catalog.add(b"\0\0" + make_key(number), 2**21 + 4096, 10**18 + number, number * 16)
    catalog.add(b"\xff\xffa_0123456789ab_r0/quarantine/x", BLOCK, 5)
    catalog.remove(b"\0\0" + make_key(500))
    return catalog, names


def test_a_journal_that_cannot_go_on_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file was cut off and the next cannot be made: no descriptor is closed twice or left."""
    written = Journal(str(tmp_path), MEMBER, SPACE, 0o600, 2**18)
    written.append([Record(Op.GONE, b"key")])
    os.truncate(tmp_path / journal.journal_name(MEMBER, 1), 1)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(journal.nofollow, "open_or_create", full)
        written.append([Record(Op.GONE, b"key")])
    assert os.listdir("/proc/self/fd") == before
    written.append([Record(Op.GONE, b"key")])
    assert written.end == (2, HEADER_BYTES + RECORD_BYTES)


def content(catalog: Catalog) -> list[object]:
    return [list(zip(*chunk, strict=True)) for chunk in catalog.chunks(10**6)]


def test_a_snapshot_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_PIECE_FILES", 64)
    catalog, names = filled()
    size = snapshot.save(str(tmp_path), catalog, names, {MEMBER: (3, 400)}, 0o640)
    path = tmp_path / snapshot.SNAPSHOT_NAME
    assert path.stat().st_size == size and path.stat().st_mode & 0o777 == 0o640
    assert [path.name] == os.listdir(tmp_path)
    again, again_names, read, whole = snapshot.load(str(tmp_path))
    assert content(again) == content(catalog) and again.nbytes == catalog.nbytes
    assert again_names.namespaces == [SPACE] and read == {MEMBER: (3, 400)} and whole
    assert again.take_victim(lambda _: False) == catalog.take_victim(lambda _: False)


def test_no_snapshot(tmp_path: Path) -> None:
    for whole in (True, False):
        catalog, *_, found = snapshot.load(str(tmp_path))
        assert len(catalog) == 0 and found == whole
        (tmp_path / snapshot.SNAPSHOT_NAME).mkdir(exist_ok=True)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_snapshot_is_read_up_to_the_damage(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.getbasetemp() / "damaged"
    directory.mkdir(exist_ok=True)
    catalog, names = filled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot, "_PIECE_FILES", 64)
        snapshot.save(str(directory), catalog, names, {}, 0o600)
        path = directory / snapshot.SNAPSHOT_NAME
        raw = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(raw) - 1))
        if data.draw(st.booleans()):
            del raw[at:]
        else:
            raw[at] ^= data.draw(st.integers(1, 255))
        path.write_bytes(raw)
        again, *_ = snapshot.load(str(directory))
    (whole,), found = content(catalog), content(again)
    assert whole[: len(again)] == (found[0] if found else []) and len(again) < len(catalog)


@given(st.binary(max_size=400))
def test_any_bytes_are_a_ledger(raw: bytes) -> None:
    assert Books.decode(raw) == Books()


def test_a_ledger_comes_back_and_a_damaged_one_does_not() -> None:
    row = Row(b"0123456789ab", Limits(1, 2, 3), 4, True, 5, 6, 7, 8, 9, (10, 11))
    books = Books(MEMBER, True, b"ba9876543210", 1, 2, 3, 4, {MEMBER: row, bytes(16): row})
    raw = books.encode()
    assert Books.decode(raw) == books
    for at in range(len(raw)):
        damaged = bytearray(raw)
        damaged[at] ^= 1
        assert Books.decode(bytes(damaged)) == Books()
        assert Books.decode(raw[:at]) == Books()


def test_a_deleted_ledger_begins_anew_for_all(tmp_path: Path) -> None:
    path = tmp_path / ".kvstrata" / "ledger"
    ledgers = [Ledger(str(tmp_path), 0o600, 0o700) for _ in range(2)]
    with ledgers[0].locked() as books:
        books.base_bytes = 7
    path.unlink()
    path.parent.rmdir()
    with ledgers[1].locked() as books:
        assert books == Books()
        books.base_bytes = 8
    with ledgers[0].locked() as books:
        assert books.base_bytes == 8
    for ledger in ledgers:
        ledger.close()


def test_the_ledger_is_exact_between_processes(tmp_path: Path) -> None:
    path = str(tmp_path)
    script = (
        "import sys; from kvstrata.tiers.fs.budget.ledger import Ledger\n"
        "ledger = Ledger(sys.argv[1], 0o600, 0o700)\n"
        "for _ in range(500):\n"
        "    with ledger.locked() as books: books.base_bytes += 1\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script, path]) for _ in range(4)]
    assert [process.wait(60.0) for process in processes] == [0] * 4
    ledger = Ledger(path, 0o600, 0o700)
    with ledger.locked() as books:
        assert books.base_bytes == 2000
    ledger.close()


def test_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(str(tmp_path))
    assert watch.is_dead(MEMBER, 1)
    lease = Lease(str(tmp_path), MEMBER, 0o600)
    assert not watch.is_dead(MEMBER, 1)
    monkeypatch.setattr("kvstrata.tiers.fs.budget.lease.SILENT_S", -1.0)
    assert watch.is_dead(MEMBER, 1)  # it holds its lock, but its beat stands still
    assert not watch.is_dead(MEMBER, 2)
    lease.close()
    assert watch.is_dead(MEMBER, 3)
    assert os.listdir(tmp_path) == []
