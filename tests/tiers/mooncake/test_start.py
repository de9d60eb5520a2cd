"""What cannot work is one error at start, or a tier that comes later."""

import socket
import time

import pytest

from kvstrata.offload.secondary import late as late_module
from kvstrata.offload.secondary.opening import TierOpener
from kvstrata.tiers.base import SecondaryTier, TierConfigError
from kvstrata.tiers.mooncake import tier as tier_module
from kvstrata.tiers.mooncake.config import MooncakeOptions
from kvstrata.tiers.mooncake.tier import MooncakeTier
from kvstrata.tiers.options import parse_options
from kvstrata.tiers.process import probe
from kvstrata.tiers.registry import TierEntry
from kvstrata.tiers.testing import CONTEXT, load, make_data, make_key, store
from tests.tiers.mooncake.conftest import OpenTier, StartMaster, StartPeer
from tests.tiers.mooncake.pool import Lender, Master, Peer
from tests.tiers.valkey.server import free_port
from tests.waiting import wait_until

SIZE = CONTEXT.layouts[0].nbytes
PAGE = {make_key(1): make_data(1, SIZE)}


@pytest.mark.parametrize(
    ("master", "parsed"),
    [("kv", ("kv", 50051)), ("kv-0.kv.svc:60000", ("kv-0.kv.svc", 60000))],
)
def test_masters(master: str, parsed: tuple[str, int]) -> None:
    options = parse_options(MooncakeOptions, {"master": master}, "mooncake tier")
    assert options.address == parsed
    assert options.segment == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "^master is missing: give the address of mooncake_master, for example"),
        ({"master": "http://kv:50051"}, "^master: 'http://kv:50051' is wrong; give \"mooncake-"),
        ({"master": "kv:65536"}, "^master: 'kv:65536' is wrong"),
        ({"master": "kv:0"}, "^master: 'kv:0' is wrong"),
        ({"master": 50051}, "^master: 50051 is wrong"),
        ({"master": "kv", "segment": "1MiB"}, "^segment: '1MiB' is too little; give 0, or \"16MiB"),
        ({"master": "kv", "segment": "lots"}, "^segment: 'lots' is not a size"),
        ({"master": "kv", "protocol": "roce"}, "^protocol: 'roce' is wrong; give one of tcp, rdma"),
        ({"master": "kv", "timeout_s": 1e-9}, "^timeout_s: 1e-09 is wrong.*at least 0.01"),
        ({"master": "kv", "timeout_s": 6}, "^timeout_s: 6 is wrong.*at most 5"),
        ({"master_server_address": "kv"}, "'master_server_address': use master"),
        ({"master": "kv", "global_segment_size": 0}, "'global_segment_size': use segment"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(TierConfigError, match=message):
        MooncakeTier.check_options(options)


def test_without_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "find_spec", lambda name: None)
    with pytest.raises(TierConfigError, match=r"pip install 'kvstrata\[mooncake\]'"):
        MooncakeTier.check_options({"master": "kv"})


def test_without_a_library_of_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "libibverbs.so.1: cannot open shared object file: No such file or directory"
    monkeypatch.setattr(probe, "find_spec", lambda name: name)
    monkeypatch.setattr(tier_module, "ask", lambda *asked: {"error": said})
    with pytest.raises(TierConfigError, match=r"libibverbs.so.1.*apt-get install libibverbs1"):
        MooncakeTier({"master": "kv"}, CONTEXT)


def test_more_memory_than_there_is() -> None:
    with pytest.raises(TierConfigError, match=r"^segment: 512.0 TiB do not fit into memory"):
        MooncakeTier({"master": "kv", "segment": "512TiB"}, CONTEXT)


def test_without_a_master(pool_is_possible: None) -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(
        TierConfigError, match=f"^master: '{address}' cannot be used.*refused.*start mooncake"
    ):
        MooncakeTier({"master": address}, CONTEXT)


def test_what_is_no_master(pool_is_possible: None, master: Master) -> None:
    """It takes connections; one says nothing, and the other speaks HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (silent.getsockname()[1], master.metrics_port):
            with pytest.raises(TierConfigError, match=r"^master: .* cannot be used"):
                MooncakeTier({"master": f"127.0.0.1:{port}", "timeout_s": 0.5}, CONTEXT)


def test_a_master_that_comes_later(
    start_master: StartMaster,
    start_peer: StartPeer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(late_module, "FIRST_PAUSE_S", 0.05)
    master = start_master()
    master.kill()
    entry = TierEntry("far", {"type": "mooncake", "master": master.address, "timeout_s": 1})
    (link,) = TierOpener([entry], CONTEXT, private=False)(10.0, time.monotonic)
    try:
        assert "the engine starts without it" in caplog.text
        master.start()
        start_peer(master)
        wait_until(lambda: comes(link.tier))
        assert load(link.tier, list(PAGE))[1] == PAGE
    finally:
        assert link.tier.shutdown(60.0)


def comes(tier: SecondaryTier) -> bool:
    tier.on_step_end()
    return not store(tier, PAGE).failed


def test_two_engines_share(open_tier: OpenTier, master: Master, peer: Peer) -> None:
    """One that starts finds what another stored, which may be gone by then."""
    first = open_tier(master)
    assert not store(first, PAGE).failed
    assert first.shutdown(60.0)
    assert load(open_tier(master), list(PAGE))[1] == PAGE


def test_a_lender_of_mooncakes_own(open_tier: OpenTier, start_master: StartMaster) -> None:
    master = start_master()
    tier = open_tier(master)
    assert set(store(tier, PAGE).failed.values()) == {"no-space"}
    lender = Lender(master)
    try:
        wait_until(lambda: not store(tier, PAGE).failed)
        assert load(tier, list(PAGE))[1] == PAGE
    finally:
        lender.kill()
