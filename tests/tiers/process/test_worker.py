"""What the I/O process queues for an engine that does not listen."""

import os
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest

from kvstrata.tiers.process.bell import Bell
from kvstrata.tiers.process.messages import MAX_PACKET, Notice, Ready, Told, unpack_records
from kvstrata.tiers.process.worker import Outbox
from kvstrata.tiers.testing import make_key
from tests.waiting import wait_until

NEWS = [(make_key(n), True) for n in range(4000)]


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def bell() -> Bell:
    fd = Bell.make()
    made = Bell(fd)
    os.close(fd)
    return made


def test_an_engine_that_does_not_listen(
    ends: tuple[socket.socket, socket.socket], bell: Bell
) -> None:
    engine, control = ends
    outbox = Outbox(control, bell)
    told = 0
    while not outbox.is_behind:
        outbox.tell(NEWS)
        told += len(NEWS)
        assert told * len(NEWS[0][0]) < 2**23, "it queues without bound"
    queued = outbox._queued
    outbox.report("io-error", "a disk that fails for ever")
    assert outbox._queued <= queued
    outbox.put(Ready())  # what the engine waits for is queued all the same
    heard = 0
    while True:
        *records, last = unpack_records(engine.recv(MAX_PACKET))
        heard += sum(len(record.news) for record in (*records, last) if isinstance(record, Told))
        if not isinstance(last, Told):
            break
    assert heard == told
    outbox.close()
    assert not outbox.is_behind and outbox._queued == 0


def test_records_keep_their_order(ends: tuple[socket.socket, socket.socket], bell: Bell) -> None:
    engine, control = ends
    outbox = Outbox(control, bell)
    heard: list[str] = []

    def listen() -> None:
        records = unpack_records(engine.recv(MAX_PACKET))
        heard.extend(record.text for record in records if isinstance(record, Notice))

    said = [str(number) for number in range(5000)]
    for number, text in enumerate(said):  # some at once, and where the socket is full, later
        outbox.say(text)
        if number % 50 == 0:
            listen()
    while len(heard) < len(said):
        listen()
    assert heard == said
    outbox.close()


def test_the_bell_rings_once_a_record_can_be_read(
    ends: tuple[socket.socket, socket.socket], bell: Bell
) -> None:
    engine, control = ends
    outbox = Outbox(control, bell)
    assert not bell.rung
    outbox.say("sent at once")
    assert bell.rung and engine.recv(MAX_PACKET, socket.MSG_DONTWAIT)
    while not outbox._queued:
        outbox.tell(NEWS)  # what follows is sent by the thread
    bell.hush()

    def nothing_queued() -> bool:
        with suppress(BlockingIOError):  # the last is read before it is counted as sent
            engine.recv(MAX_PACKET, socket.MSG_DONTWAIT)
        return not outbox._queued

    wait_until(nothing_queued)
    outbox.close()
    assert bell.rung
