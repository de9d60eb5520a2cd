"""A pool whose master or memory ends, hangs, is full, or holds what is no page: misses, no more."""

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from kvstrata.tiers.base import Lookup, SecondaryTier
from kvstrata.tiers.mooncake.tier import MooncakeTier
from kvstrata.tiers.process import supervisor
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
from tests.tiers.link import SlowLinkContract
from tests.tiers.mooncake.conftest import OpenTier, StartMaster, StartPeer
from tests.tiers.mooncake.pool import LEAST_SEGMENT, Master, Peer
from tests.tiers.mooncake.values import Values, name_of, whole
from tests.waiting import PATIENCE_S, wait_until

SIZE = CONTEXT.layouts[1].nbytes
KEY = make_key(1, group=1)
PAGE = {KEY: make_data(1, SIZE)}
MANY = {make_key(n, group=1): make_data(n, SIZE) for n in range(600)}  # tasks for all threads
SPARED = -706  # what the library says of a value that stays for a while


def causes(tier: SecondaryTier, *keys: bytes) -> set[str]:
    """Why these pages cannot be loaded."""
    return set(load(tier, keys)[0].failed.values())


def test_a_master_that_was_killed_is_used_again(
    open_tier: OpenTier,
    start_master: StartMaster,
    start_peer: StartPeer,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    master = start_master()
    start_peer(master)
    tier = open_tier(master, timeout_s=0.5)
    assert not store(tier, PAGE).failed
    capfd.readouterr()
    master.kill()
    for number in range(2, 5):
        assert store(tier, {make_key(number, group=1): b"\1" * SIZE}).failed
        assert causes(tier, KEY) == {"io-error"}
        assert settle(tier, make_key(9), RequestView(f"{number}")) is Lookup.MISS
    said = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == 1 and master.address in said[0].getMessage()
    assert capfd.readouterr() == ("", "")  # the library has its own word for each failure
    master.start()  # and knows nothing of what was there
    wait_until(lambda: causes(tier, KEY) == {"missing"})
    wait_until(lambda: not store(tier, PAGE).failed)
    assert load(tier, [KEY])[1] == PAGE


def test_killed_while_it_stores(
    open_tier: OpenTier, start_master: StartMaster, start_peer: StartPeer
) -> None:
    master = start_master()
    start_peer(master)
    tier = open_tier(master, timeout_s=0.5)
    master.pause()
    slots = Slots.make(len(MANY), SIZE)
    for place, page in enumerate(MANY.values()):
        slots.view(place)[:] = page
    tier.submit_store(make_job(1, list(MANY), slots, CONTEXT))
    master.kill()
    (result,) = finish(tier)
    assert set(result.failed) == set(MANY) and set(result.failed.values()) == {"io-error"}
    master.start()
    wait_until(lambda: not store(tier, MANY).failed)
    assert load(tier, list(MANY))[1] == MANY


def test_nobody_waits_for_a_master_that_hangs(
    open_tier: OpenTier, start_master: StartMaster, start_peer: StartPeer
) -> None:
    """A job of many tasks takes as long as a call or two, which end by the clock."""
    master = start_master("--client_ttl=3600")
    start_peer(master)
    tier = open_tier(master, timeout_s=1)
    store(tier, MANY)
    master.pause()
    start = time.monotonic()
    assert causes(tier, *MANY) == {"io-error"}
    assert set(store(tier, {make_key(999, group=1): b"\1" * SIZE}).failed.values()) == {"io-error"}
    assert settle(tier, make_key(998)) is Lookup.MISS
    assert time.monotonic() - start < PATIENCE_S / 2
    assert tier.stats().counters["restarted_processes"] == 0
    master.resume()
    wait_until(lambda: load(tier, list(MANY))[1] == MANY)


class TestSlowLink(SlowLinkContract):
    """To the master; the pages take no way that could be made slow."""

    IN_TIME, TOO_SLOW = 16 * 1024, 20

    @pytest.fixture
    def server_port(self, master: Master) -> int:
        return master.port

    @pytest.fixture
    def open_tier_on(self, open_tier: OpenTier, master: Master) -> Callable[[int], MooncakeTier]:
        return lambda port: open_tier(master, master=f"127.0.0.1:{port}", timeout_s=1)


def test_nobody_waits_for_memory_that_hangs(
    open_tier: OpenTier, start_master: StartMaster, start_peer: StartPeer
) -> None:
    """The library itself would wait for a minute."""
    master = start_master("--client_ttl=10")
    peer = start_peer(master)
    tier = open_tier(master, timeout_s=1)
    store(tier, PAGE)
    assert load(tier, [KEY])[1] == PAGE
    assert list(tier.take_changes(9)) == [(KEY, True)]
    peer.pause()
    start = time.monotonic()
    assert causes(tier, KEY) == {"io-error"}
    assert store(tier, {make_key(2, group=1): b"\1" * SIZE}).failed
    assert time.monotonic() - start < PATIENCE_S / 2
    wait_until(lambda: causes(tier, KEY) == {"missing"})  # the master gave it up
    assert (KEY, False) in tier.take_changes(9)
    peer.resume()
    wait_until(lambda: not store(tier, PAGE).failed)
    assert load(tier, [KEY])[1] == PAGE
    assert tier.stats().counters["restarted_processes"] == 0


def test_memory_that_hangs_when_it_is_first_needed(
    open_tier: OpenTier,
    start_master: StartMaster,
    start_peer: StartPeer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here no setting of the library's helps; the process that waits is replaced."""
    monkeypatch.setattr(supervisor, "STALL_S", 3.0)
    master = start_master()
    peer = start_peer(master)
    tier = open_tier(master, timeout_s=1)
    peer.pause()
    assert set(store(tier, PAGE).failed.values()) == {"stalled"}
    peer.resume()
    wait_until(lambda: not store(tier, PAGE).failed)
    assert load(tier, [KEY])[1] == PAGE


def test_memory_that_is_gone(
    open_tier: OpenTier, start_master: StartMaster, start_peer: StartPeer
) -> None:
    master = start_master()
    peer = start_peer(master)
    tier = open_tier(master, timeout_s=1)
    store(tier, MANY)
    peer.kill()
    assert causes(tier, KEY) <= {"io-error", "missing"}
    wait_until(lambda: causes(tier, *MANY) == {"missing"})
    assert set(store(tier, PAGE).failed.values()) == {"no-space"}
    start_peer(master)
    assert not store(tier, MANY).failed
    assert load(tier, list(MANY))[1] == MANY


def test_a_full_pool_fails_pages_and_not_the_tier(
    open_tier: OpenTier, start_master: StartMaster, start_peer: StartPeer
) -> None:
    master = start_master()
    peer = start_peer(master)
    tier = open_tier(master)
    for size in (2**20, 2**16, 2**12):  # nothing is left that a page would fit in
        number = 0
        while peer.put(f"{size} {number}", bytes(size), pinned=True) == 0:
            number += 1
    assert set(store(tier, MANY).failed.values()) == {"no-space"}
    assert "no-space" in tier.page_causes
    assert tier.stats().failures == {"no-space": len(MANY)}
    peer.clear()
    assert not store(tier, MANY).failed
    assert load(tier, list(MANY))[1] == MANY


def test_a_pool_evicts(
    open_tier: OpenTier, start_master: StartMaster, start_peer: StartPeer
) -> None:
    master = start_master("--default_kv_lease_ttl=2000")
    start_peer(master)
    tier = open_tier(master)
    list(tier.take_changes(0))
    room = LEAST_SEGMENT // SIZE
    pages = {make_key(n, group=1): make_data(n % 7, SIZE) for n in range(3 * room // 2)}
    keys = list(pages)
    for start in range(0, len(keys), 100):
        some = {key: pages[key] for key in keys[start : start + 100]}
        wait_until(lambda some=some: not store(tier, some).failed)
    arrived = {}
    for start in range(0, len(keys), 100):
        result, found = load(tier, keys[start : start + 100])
        arrived |= found
        assert set(result.failed.values()) <= {"missing"}
    assert 0 < len(arrived) < len(pages)
    assert arrived == {key: pages[key] for key in arrived}
    assert set(tier.take_changes(0)) == {(key, True) for key in arrived}


def test_a_pool_keeps_what_a_request_wishes_to_stay(
    open_tier: OpenTier, start_master: StartMaster, start_peer: StartPeer
) -> None:
    master = start_master("--default_kv_lease_ttl=2000", "--allow_evict_soft_pinned_objects=false")
    start_peer(master)
    tier = open_tier(master)
    kept = {make_key(n, group=1): make_data(n, SIZE) for n in range(5000, 5100)}
    slots = Slots.make(len(kept), SIZE)
    for place, page in enumerate(kept.values()):
        slots.view(place)[:] = page
    wish = RequestView("wish", pin_s=600.0)
    tier.submit_store(make_job(1, list(kept), slots, CONTEXT, request=wish))
    assert not finish(tier)[0].failed
    others = 2 * LEAST_SEGMENT // (SIZE + 4096)
    for start in range(0, others, 100):
        some = {make_key(n, group=1): make_data(n % 7, SIZE) for n in range(start, start + 100)}
        wait_until(lambda some=some: not store(tier, some).failed)
    assert load(tier, [make_key(n, group=1) for n in range(100)])[0].failed  # the oldest of them
    assert load(tier, list(kept))[1] == kept


def _flipped(value: bytes, place: int) -> bytes:
    return value[:place] + bytes([value[place] ^ 1]) + value[place + 1 :]


# what becomes of a value, and the word for it
CHANGES: Mapping[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut off": (lambda value: value[:-1], "truncated"),
    "cut off in the header": (lambda value: value[:100], "truncated"),
    "one byte": (lambda value: b"\0", "truncated"),
    "longer": (lambda value: value + b"\0", "size"),
    "much longer": (lambda value: value * 3, "size"),
    "flipped data": (lambda value: _flipped(value, len(value) - 5), "checksum"),
    "flipped header": (lambda value: _flipped(value, 5), "header"),
    "another version": (lambda v: v.replace(b'version":"1"', b'version":"2"'), "version"),
    "zeros": (lambda value: bytes(len(value)), "header"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_no_page_is_not_believed(
    open_tier: OpenTier, master: Master, peer: Peer, values: Values, name: str
) -> None:
    change, cause = CHANGES[name]
    tier = open_tier(master)
    store(tier, PAGE)
    good = whole(KEY, PAGE[KEY])
    assert peer.get(name_of(KEY)) == good
    assert peer.put(name_of(KEY), change(good)) == 0
    result, _ = load(tier, [KEY])
    assert result.failed == {KEY: cause}
    assert cause in tier.page_causes
    assert settle(tier, KEY, RequestView("later")) is not Lookup.HIT
    assert not store(tier, PAGE).failed
    assert values.get(tier, CONTEXT, KEY) == PAGE[KEY]
    assert load(tier, [KEY])[1] == PAGE


def test_a_page_of_another_key_is_not_believed(
    open_tier: OpenTier, master: Master, peer: Peer
) -> None:
    other = make_key(2, group=1)
    tier = open_tier(master)
    store(tier, PAGE)
    peer.put(name_of(KEY), whole(other, make_data(2, SIZE)))
    assert load(tier, [KEY])[0].failed == {KEY: "key"}


def test_what_the_master_spares_is_removed_all_the_same(
    open_tier: OpenTier, master: Master, peer: Peer
) -> None:
    tier = open_tier(master)
    store(tier, PAGE)
    load(tier, [KEY])
    assert peer.drop(name_of(KEY)) == SPARED
    slots = Slots.make(1, SIZE)
    tier.submit_reject(make_job(5, [KEY], slots, CONTEXT), distrust=False)
    (result,) = finish(tier)
    assert not result.failed
    assert peer.get(name_of(KEY)) is None


def test_two_models_never_meet(open_tier: OpenTier, master: Master) -> None:
    ours = open_tier(master)
    theirs = open_tier(master, replace(CONTEXT, namespace={**CONTEXT.namespace, "test": 2}))
    store(ours, PAGE)
    assert settle(theirs, KEY) is Lookup.MISS
    assert causes(theirs, KEY) == {"missing"}
    find(open_tier(master), KEY)


def test_an_engine_lends_memory(open_tier: OpenTier, start_master: StartMaster) -> None:
    """What it lends is all the pool has; it ends with the process that lends it."""
    master = start_master()
    guest = open_tier(master, timeout_s=1)
    assert set(store(guest, PAGE).failed.values()) == {"no-space"}
    host = open_tier(master, timeout_s=1, segment=LEAST_SEGMENT)
    wait_until(lambda: not store(guest, PAGE).failed)
    find(host, KEY)
    assert load(host, [KEY])[1] == PAGE

    _, writer = host.processes[0].pids()
    os.kill(writer, signal.SIGKILL)
    wait_until(lambda: causes(guest, KEY) == {"missing"})
    wait_until(lambda: not store(host, PAGE).failed)  # another process lends as much
    find(guest, KEY)
    assert load(guest, [KEY])[1] == PAGE

    assert host.shutdown(60.0)
    wait_until(lambda: causes(guest, KEY) == {"missing"})
