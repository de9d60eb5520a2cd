"""A slow way to a server, and what any tier must do about it."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import pytest

from kvstrata.tiers.base import Lookup, PageKey
from kvstrata.tiers.process.tier import ProcessTier
from kvstrata.tiers.testing import CONTEXT, RequestView, load, make_data, make_key, settle, store
from tests.waiting import PATIENCE_S, wait_until

GROUP = 1


class Link:
    """Takes connections on `port` and passes them on to another of this machine.

    `bytes_per_s` go through, each way and all connections together; it may change at any time.
    """

    def __init__(self, server_port: int) -> None:
        self.bytes_per_s = math.inf
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Cut all connections."""
        for each in (self._listener, *self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        up, down = _Way(self), _Way(self)
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
                self._open += client, server
                for way, pair in ((up, (client, server)), (down, (server, client))):
                    threading.Thread(target=way.carry, args=pair, daemon=True).start()


class _Way:
    """One of the two directions."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._free = 0.0  # when the next byte may go

    def carry(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1024):
                self._wait_for(len(data))
                target.sendall(data)
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _wait_for(self, nbytes: int) -> None:
        with self._lock:
            start = max(self._free, time.monotonic())
            self._free = start + nbytes / self._link.bytes_per_s
            due, rate = self._free, self._link.bytes_per_s
        while self._link.bytes_per_s == rate and (rest := due - time.monotonic()) > 0:
            time.sleep(min(rest, 0.01))
        if self._link.bytes_per_s != rate:
            self._free = 0.0


def pages(count: int, first: int = 0) -> Mapping[PageKey, bytes]:
    """Pages of 8 to 12 KiB."""
    size = CONTEXT.layouts[GROUP].nbytes
    return {make_key(n, group=GROUP): make_data(n, size) for n in range(first, first + count)}


class SlowLinkContract:
    """For each tier with a server; the subclass has the fixtures."""

    IN_TIME, TOO_SLOW = 64 * 1024, 1024  # bytes a second

    @pytest.fixture
    def open_tier_on(self) -> Callable[[int], ProcessTier]:
        """Opens a tier whose server is on this port, with a `timeout_s` of 1."""
        raise NotImplementedError

    @pytest.fixture
    def server_port(self) -> int:
        """Of the server itself."""
        raise NotImplementedError

    @pytest.fixture
    def link(self, server_port: int, request: pytest.FixtureRequest) -> Link:
        link = Link(server_port)
        request.addfinalizer(link.close)
        return link

    def test_what_comes_slowly_but_in_time_is_whole(
        self, link: Link, open_tier_on: Callable[[int], ProcessTier]
    ) -> None:
        tier, few = open_tier_on(link.port), pages(3)
        link.bytes_per_s = self.IN_TIME
        assert not store(tier, few).failed
        assert load(tier, list(few))[1] == few
        assert not tier.stats().failures

    def test_what_comes_too_late_has_failed_and_nobody_waits_for_it(
        self, link: Link, open_tier_on: Callable[[int], ProcessTier]
    ) -> None:
        tier, many, others = open_tier_on(link.port), pages(20), pages(20, first=100)
        assert not store(tier, many).failed
        link.bytes_per_s = self.TOO_SLOW
        start = time.monotonic()
        failed = load(tier, list(many))[0].failed
        assert set(failed) == set(many) and set(failed.values()) <= {"unreachable", "io-error"}
        assert set(store(tier, others).failed) == set(others)
        assert settle(tier, make_key(999, GROUP), RequestView("slow")) is Lookup.MISS
        assert time.monotonic() - start < PATIENCE_S / 2  # each page by itself would take 400 s
        assert tier.stats().counters["restarted_processes"] == 0
        link.bytes_per_s = math.inf
        wait_until(lambda: load(tier, list(many))[1] == many)
        wait_until(lambda: not store(tier, others).failed)
        assert load(tier, list(others))[1] == others
