"""What fits into a packet, and what a packet that is none does."""

from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.tiers.page.identity import MAX_HASH_BYTES
from kvstrata.tiers.process.medium import Outcome, PageRef
from kvstrata.tiers.process.messages import (
    HEADER_BYTES,
    MAX_PACKET,
    MOST_NEWS,
    MOST_PAGES,
    Complete,
    Done,
    Failure,
    Kind,
    Notice,
    Ready,
    Record,
    Task,
    Told,
    Trusted,
    Upkeep,
    pack,
    packet,
    short,
    short_cause,
    unpack_records,
    unpack_tasks,
)

LONGEST = bytes(MAX_HASH_BYTES + 4)
FAR = 2**32 - 1

outcomes = st.builds(Outcome, st.none() | st.text(max_size=9), *[st.booleans()] * 3)
times = st.floats(0)
news = st.lists(st.tuples(st.binary(max_size=9), st.booleans()), max_size=3)
records = st.one_of(
    st.builds(
        Done, st.integers(0, 2**60), st.lists(outcomes, max_size=3), st.floats(0), st.floats(0)
    ),
    st.builds(Failure, st.text(max_size=9), st.text(max_size=9)),
    st.builds(Upkeep, st.dictionaries(st.text(max_size=9), st.integers(0, 2**60), max_size=3)),
    st.builds(Told, news),
    st.builds(Trusted, st.booleans()),
    st.builds(Complete, st.booleans()),
    st.builds(Notice, st.text(max_size=9)),
    st.just(Ready()),
)
keys = st.lists(st.binary(max_size=9), max_size=3)
tasks = st.builds(Task, st.sampled_from(Kind), keys, access=st.integers(0, 2**64 - 1))


@given(st.lists(records, max_size=4))
def test_records_come_out_as_they_went_in(sent: list[Record]) -> None:
    assert unpack_records(packet(list(map(pack, sent)))) == sent


@given(st.lists(tasks, max_size=4))
def test_tasks_come_out_as_they_went_in(sent: list[Task]) -> None:
    assert unpack_tasks(packet(list(map(pack, sent)))) == sent


def test_the_pages_of_a_task() -> None:
    task = Task(Kind.STORE, [b"a", b"b"], [7, 8], [16, 32])
    assert task.pages() == [PageRef(b"a", 16, False), PageRef(b"b", 32, False)]
    task.rewrites = [False, True]
    assert task.pages() == [PageRef(b"a", 16, False), PageRef(b"b", 32, True)]


def test_the_largest_task_fits_into_a_packet() -> None:
    columns = [FAR] * MOST_PAGES, [FAR] * MOST_PAGES, [True] * MOST_PAGES
    task = Task(Kind.STORE, [LONGEST] * MOST_PAGES, *columns, 2**64 - 1, FAR, FAR)
    assert len(packet([pack(task)])) <= MAX_PACKET


@pytest.mark.parametrize(
    "record",
    [
        Done(FAR, [Outcome(short_cause("\u00e4" * 999), True, True, True)] * MOST_PAGES, 1e9, 1e9),
        Told([(LONGEST, True)] * MOST_NEWS),
        Failure(short_cause("x" * 2**20), short("\U0001f600" * 2**20)),
        Notice(short("\ud800" * 2**20)),
    ],
    ids=lambda record: type(record).__name__,
)
def test_two_of_the_largest_records_fit_into_a_packet(record: Record) -> None:
    """`Outbox` adds one to what is less than half a packet."""
    assert len(pack(record)) + HEADER_BYTES <= MAX_PACKET // 2


@given(st.binary(max_size=60))
def test_what_is_no_packet_is_refused(raw: bytes) -> None:
    for unpack in (unpack_tasks, unpack_records):
        with suppress(msgspec.MsgspecError):
            unpack(raw)


@given(st.lists(records, min_size=1, max_size=3), st.data())
def test_a_changed_packet_is_refused_or_is_of_records(
    sent: list[Record], data: st.DataObject
) -> None:
    raw = bytearray(packet(list(map(pack, sent))))
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    try:
        found = unpack_records(bytes(raw))
    except msgspec.MsgspecError:
        return
    assert all(isinstance(each, Record) for each in found)
