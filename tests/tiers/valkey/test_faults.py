"""A server that ends, hangs, is full, or holds what is no page: misses, and nothing else."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from kvstrata.tiers.base import Lookup
from kvstrata.tiers.process import tier as tier_module
from kvstrata.tiers.testing import (
    CONTEXT,
    RequestView,
    Slots,
    find,
    finish,
    load,
    make_data,
    make_job,
    make_key,
    settle,
    store,
)
from kvstrata.tiers.valkey.tier import ValkeyTier
from tests.tiers.link import SlowLinkContract
from tests.tiers.valkey.conftest import OpenTier, StartServer
from tests.tiers.valkey.server import Server
from tests.tiers.valkey.values import Values, names
from tests.waiting import PATIENCE_S, wait_until

SIZE = CONTEXT.layouts[1].nbytes
KEY = make_key(1, group=1)
PAGE = {KEY: make_data(1, SIZE)}
MANY = {make_key(n, group=1): make_data(n, SIZE) for n in range(40)}
LOTS = {make_key(n, group=1): make_data(n, SIZE) for n in range(200)}


@pytest.fixture
def values(server: Server) -> Values:
    return Values(server)


def test_a_server_that_was_killed_is_used_again(
    open_tier: OpenTier, start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server()
    tier = open_tier(server, timeout_s=0.3)
    assert not store(tier, PAGE).failed
    server.kill()
    for number in range(2, 5):
        assert store(tier, {make_key(number, group=1): b"\1" * SIZE}).failed
        assert load(tier, [KEY])[0].failed == {KEY: "io-error"}
        assert settle(tier, make_key(9), RequestView(f"{number}")) is Lookup.MISS
    said = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == 1 and server.url in said[0].getMessage()
    assert tier.stats().failures["io-error"] >= 9
    server.start()
    wait_until(lambda: not store(tier, PAGE).failed)
    wait_until(lambda: load(tier, [KEY])[1] == PAGE)  # by another process, with its own client


def test_killed_while_it_stores(open_tier: OpenTier, start_server: StartServer) -> None:
    server = start_server()
    tier = open_tier(server, timeout_s=0.5)
    server.pause()
    slots = Slots.make(len(MANY), SIZE)
    for place, page in enumerate(MANY.values()):
        slots.view(place)[:] = page
    tier.submit_store(make_job(1, list(MANY), slots, CONTEXT))
    server.kill()
    (result,) = finish(tier)
    assert set(result.failed) == set(MANY) and set(result.failed.values()) == {"io-error"}
    server.start()
    for key in MANY:
        assert settle(tier, key, RequestView(key.hex())) is Lookup.MISS
    wait_until(lambda: not store(tier, MANY).failed)
    wait_until(lambda: load(tier, list(MANY))[1] == MANY)


def test_a_server_that_was_emptied_has_no_pages(
    open_tier: OpenTier, start_server: StartServer
) -> None:
    server = start_server()
    tier = open_tier(server)
    store(tier, MANY)
    assert set(tier.take_changes(len(MANY))) == {(key, True) for key in MANY}
    server.kill()
    server.start()
    wait_until(lambda: set(load(tier, list(MANY))[0].failed.values()) == {"missing"})
    assert set(tier.take_changes(len(MANY))) == {(key, False) for key in MANY}
    assert not store(tier, MANY).failed
    assert load(tier, list(MANY))[1] == MANY


def test_nobody_waits_for_a_server_that_hangs(
    open_tier: OpenTier,
    start_server: StartServer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A job of many tasks takes as long as one call, which ends by the clock."""
    monkeypatch.setattr(tier_module, "_TASK_BYTES", 1)
    server = start_server()
    tier = open_tier(server, timeout_s=2)
    store(tier, LOTS)
    capfd.readouterr()
    server.pause()
    start = time.monotonic()
    assert set(load(tier, list(LOTS))[0].failed.values()) == {"io-error"}
    assert set(store(tier, {make_key(999, group=1): b"\1" * SIZE}).failed.values()) == {"io-error"}
    assert settle(tier, make_key(998)) is Lookup.MISS
    assert time.monotonic() - start < PATIENCE_S / 2  # task by task it would be 50 s, or 100
    assert tier.stats().counters["restarted_processes"] == 0
    assert capfd.readouterr() == ("", "")  # the library has its own word for each failure
    server.resume()
    wait_until(lambda: load(tier, list(LOTS))[1] == LOTS)


class TestSlowLink(SlowLinkContract):
    @pytest.fixture
    def server_port(self, server: Server) -> int:
        return server.port

    @pytest.fixture
    def open_tier_on(self, open_tier: OpenTier, server: Server) -> Callable[[int], ValkeyTier]:
        return lambda port: open_tier(server, url=f"valkey://127.0.0.1:{port}", timeout_s=1)


def give_room_for_half(server: Server) -> None:
    """For half of `LOTS`, beside what the server itself has."""
    about = dict(
        row.split(":", 1) for row in server.ask("INFO", "memory").decode().split() if ":" in row
    )
    room = int(about["used_memory"]) + len(LOTS) // 2 * SIZE
    server.ask("CONFIG", "SET", "maxmemory", room)


def test_a_full_server_fails_pages_and_not_the_tier(
    open_tier: OpenTier, start_server: StartServer
) -> None:
    server = start_server("--maxmemory-policy", "noeviction")
    tier = open_tier(server)
    store(tier, PAGE)
    give_room_for_half(server)
    result = store(tier, LOTS)
    assert result.failed and set(result.failed.values()) == {"no-space"}
    assert "no-space" in tier.page_causes
    stored = [key for key in LOTS if key not in result.failed]
    assert stored and load(tier, stored)[1] == {key: LOTS[key] for key in stored}
    assert tier.stats().failures == {"no-space": len(result.failed)}


def _loads(tier: ValkeyTier, pages: Mapping[bytes, bytes]) -> bool:
    return load(tier, list(pages))[1] == pages


def test_a_server_evicts_what_was_not_used(open_tier: OpenTier, start_server: StartServer) -> None:
    server = start_server("--maxmemory-policy", "allkeys-lru")
    tier = open_tier(server)
    store(tier, PAGE)
    give_room_for_half(server)
    assert not store(tier, LOTS).failed
    list(tier.take_changes(2 * len(LOTS)))
    result, arrived = load(tier, list(LOTS))
    assert arrived == {key: LOTS[key] for key in arrived} and arrived
    assert result.failed and set(result.failed.values()) == {"missing"}
    assert set(tier.take_changes(len(LOTS))) == {(key, False) for key in result.failed}
    for key in list(result.failed)[:20]:  # of some, the server may have kept one value
        page = {key: LOTS[key]}
        # which of those of the same second goes is chance
        wait_until(lambda page=page: not store(tier, page).failed and _loads(tier, page))


@pytest.mark.parametrize("half", [0, 1])
def test_half_a_page_is_no_page(
    open_tier: OpenTier,
    server: Server,
    values: Values,
    half: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tier = open_tier(server)
    store(tier, PAGE)
    server.ask("DEL", names(KEY)[half])
    assert load(tier, [KEY])[0].failed == {KEY: "missing"}
    assert f"missing: it is not there (page {KEY[:-4].hex()})" in caplog.text
    assert settle(tier, KEY, RequestView("later")) is Lookup.MISS
    assert not store(tier, PAGE).failed
    assert values.get(tier, CONTEXT, KEY) == PAGE[KEY]
    assert load(tier, [KEY])[1] == PAGE


def _flipped(data: bytes) -> bytes:
    return data[:5] + bytes([data[5] ^ 1]) + data[6:]


# which of the two values, what becomes of it, and the word for it
CHANGES: Mapping[str, tuple[int, Callable[[bytes], bytes], str]] = {
    "data cut off": (1, lambda data: data[:-1], "truncated"),
    "no data": (1, lambda data: b"", "truncated"),
    "longer data": (1, lambda data: data + b"\0", "size"),
    "flipped data": (1, _flipped, "checksum"),
    "header cut off": (0, lambda header: header[:100], "truncated"),
    "no header": (0, lambda header: b"", "truncated"),
    "longer header": (0, lambda header: header + b"\0", "size"),
    "another version": (0, lambda h: h.replace(b'version":"1"', b'version":"2"'), "version"),
    "flipped header": (0, _flipped, "header"),
    "zeros": (0, lambda header: bytes(len(header)), "header"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_no_page_is_not_believed(
    open_tier: OpenTier, server: Server, values: Values, name: str
) -> None:
    place, change, cause = CHANGES[name]
    tier = open_tier(server)
    store(tier, PAGE)
    server.ask("SET", names(KEY)[place], change(server.ask("GET", names(KEY)[place])))
    result, _ = load(tier, [KEY])
    assert result.failed == {KEY: cause}
    assert cause in tier.page_causes
    assert settle(tier, KEY, RequestView("later")) is not Lookup.HIT
    assert not store(tier, PAGE).failed
    assert values.get(tier, CONTEXT, KEY) == PAGE[KEY]
    assert load(tier, [KEY])[1] == PAGE


def test_pages_of_others_are_not_believed(open_tier: OpenTier, server: Server) -> None:
    other = make_key(2, group=1)
    tier = open_tier(server)
    store(tier, PAGE | {other: make_data(2, SIZE)})
    for mine, theirs in zip(names(KEY), names(other), strict=True):
        server.ask("SET", mine, server.ask("GET", theirs))
    server.ask("DEL", *names(other))
    server.ask("LPUSH", names(other)[1], "no string")
    server.ask("SET", names(other)[0], "a header")
    result, _ = load(tier, [KEY, other])
    assert result.failed == {KEY: "key", other: "missing"}


def test_two_models_never_meet(open_tier: OpenTier, server: Server) -> None:
    ours = open_tier(server)
    theirs = open_tier(server, replace(CONTEXT, namespace={**CONTEXT.namespace, "test": 2}))
    store(ours, PAGE)
    assert settle(theirs, KEY) is Lookup.MISS
    assert load(theirs, [KEY])[0].failed == {KEY: "missing"}
    find(open_tier(server), KEY)


def test_a_page_leaves_when_its_time_is_over(open_tier: OpenTier, server: Server) -> None:
    tier = open_tier(server, ttl_s=1000)
    store(tier, PAGE)
    assert all(990 <= server.ask("TTL", name) <= 1000 for name in names(KEY))
    for name in names(KEY):
        server.ask("EXPIRE", name, 10)
    assert not store(tier, PAGE).failed  # stored again, it stays as long as a new one
    assert all(server.ask("TTL", name) >= 990 for name in names(KEY))
    for name in names(KEY):
        server.ask("PEXPIRE", name, 1)
    wait_until(lambda: server.ask("EXISTS", *names(KEY)) == 0)
    assert load(tier, [KEY])[0].failed == {KEY: "missing"}


def test_a_password_that_is_changed(
    open_tier: OpenTier, start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    server = start_server(password="first-secret")
    file = server.home / "password"
    file.write_text("first-secret\n")
    tier = open_tier(server, timeout_s=0.5, password_file=str(file))
    store(tier, PAGE)
    server.kill()
    server.password = "second-secret"
    server.start()
    assert load(tier, [KEY])[0].failed == {KEY: "io-error"}
    assert "secret" not in caplog.text


def test_pages_that_are_not_the_models_take_the_namespace_out(
    open_tier: OpenTier, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """For all servers that start, until somebody deletes the mark."""
    tier = open_tier(server)
    store(tier, MANY)
    slots = Slots.make(1, SIZE)
    assert tier.submit_reject(make_job(5, [KEY], slots, CONTEXT), distrust=True)
    finish(tier)
    assert not tier.trusted and server.ask("EXISTS", *names(KEY)) == 0
    (mark,) = server.ask("KEYS", "*}:distrusted")
    assert b"audits found pages" in server.ask("GET", mark)
    assert mark.decode() in tier.how_to_trust()
    assert not open_tier(server).trusted and mark.decode() in caplog.text
    server.ask("DEL", mark)
    assert open_tier(server).trusted
