"""Requests' wishes: what is understood, and that wrong ones are read strictly and never hurt."""

import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.offload.request.parameters import NO_PARAMETERS, ParameterReader, Parameters

TIERS = ("fs", "memory")
FS, NOWHERE = Parameters(frozenset({"fs"})), Parameters(frozenset())


@pytest.mark.parametrize(
    ("wishes", "meant"),
    [
        ({}, NO_PARAMETERS),
        ({"persist": True}, NO_PARAMETERS),
        ({"persist": False}, NOWHERE),
        ({"tiers": ["fs"]}, FS),
        ({"tiers": []}, NOWHERE),
        ({"tiers": ["fs"], "persist": False}, NOWHERE),
        ({"pin_seconds": 600}, Parameters(None, 600.0)),
        ({"pin_seconds": 0.5, "tiers": ["memory", "fs"]}, Parameters(frozenset(TIERS), 0.5)),
    ],
)
def test_what_is_right(wishes: dict[str, object], meant: Parameters) -> None:
    reader = ParameterReader(TIERS)
    assert reader.read({"kvstrata": wishes, "max_offload_tokens": 3}) == meant
    assert reader.read({}) is reader.read({"kvstrata": None}) is NO_PARAMETERS
    assert reader.wrong == 0


@pytest.mark.parametrize(
    ("params", "meant"),
    [
        # beside our key instead of in it
        ({"persist": False}, NOWHERE),
        ({"persist": True}, NO_PARAMETERS),
        ({"Persist": False}, NOWHERE),
        ({"tiers": ["fs"]}, FS),
        ({"pin_seconds": 5}, Parameters(None, 5.0)),
        ({"pinSeconds": 5}, Parameters(None, 5.0)),
        ({"kvstrata.persist": False}, NOWHERE),
        ({"kvstrata_tiers": ["fs"]}, FS),
        ({"kvstrata": {"persist": True}, "persist": False}, NOWHERE),
        ({"kvstrata": {"persist": False}, "persist": True}, NOWHERE),
        ({"kvstrata": {"tiers": ["fs"]}, "tiers": ["memory"]}, NOWHERE),
        # our key spelt otherwise, deeper, or with its object as text
        ({"kv_strata": {"persist": False}}, NOWHERE),
        ({"KV-Strata": {"tiers": ["fs"]}}, FS),
        ({"kvstrata": '{"persist": false}'}, NOWHERE),
        ({"kvstrata": '{"tiers": ["fs"]}'}, FS),
        ({"kvstrata": {"kvstrata": {"tiers": ["fs"]}}}, FS),
        ({"kv_transfer_params": {"kvstrata": {"tiers": ["fs"]}}}, FS),
        ({"kv_transfer_params": {"persist": False}}, NOWHERE),
        ({"extra_args": {"kvstrata": {"tiers": ["fs"]}}}, FS),
        ({"kv_transfer_params": '{"kvstrata": {"tiers": ["fs"]}}'}, FS),
        ({"offload": {"persist": False}}, NOWHERE),
        ({"kv": {"pin_seconds": 5}}, Parameters(None, 5.0)),
        ({"vllm_xargs": {"kvstrata.tiers": ["fs"]}}, FS),
        # values whose meaning is plain
        ({"kvstrata": {"persist": "false"}}, NOWHERE),
        ({"kvstrata": {"persist": 0}}, NOWHERE),
        ({"kvstrata": {"persist": "True"}}, NO_PARAMETERS),
        ({"kvstrata": {"persist": 1}}, NO_PARAMETERS),
        ({"kvstrata": {"PERSIST": False}}, NOWHERE),
        ({"kvstrata": {"tiers": "fs"}}, FS),
        ({"kvstrata": {"tier": "FS"}}, FS),
        ({"kvstrata": {"tiers": ["fs", "disk"]}}, FS),
        ({"kvstrata": {"pin_seconds": "600"}}, Parameters(None, 600.0)),
    ],
)
def test_what_is_understood_all_the_same(
    params: dict[str, object], meant: Parameters, caplog: pytest.LogCaptureFixture
) -> None:
    reader = ParameterReader(TIERS)
    with caplog.at_level(logging.WARNING):
        assert reader.read(params) == meant
    assert reader.wrong == len(caplog.records) >= 1


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"kvstrata": 7}, 'kvstrata=7: it is not understood, .*; use an object such as {"persist'),
        ({"kvstrata": False}, "kvstrata=False: it is not understood"),
        ({"kvstrata": True}, "kvstrata=True: it is not understood"),
        ({"kvstrata": "no"}, "kvstrata='no': it is not understood"),
        ({"kvstrata": [{"persist": False}]}, "not understood, so no secondary tier gets the pages"),
        ({"kvstrate": {"persist": True}}, 'kvstrate={.*: it is not understood.*in "kvstrata"'),
        ({"strata": {"persist": True}}, "strata={.*: it is not understood"),
        ({"kvstrata_v2": {"persist": True}}, "kvstrata_v2={.*: it is not understood"),
        ({"presist": True}, r"presist=True: it is not .* \(did you mean 'persist'\?\)"),
        ({"no_persist": True}, "no_persist=True: it is not understood"),
        ({"persistence": "none"}, "persistence='none': it is not understood"),
        ({"kv_store_tiers": ["fs"]}, "kv_store_tiers=.*: it is not understood"),
        ({"kvstrata": {"persist": None}}, "persist=None: use true or false; it is read as false"),
        ({"kvstrata": {"persist": "perhaps"}}, "use true or false; it is read as false"),
        ({"kvstrata": {"persist": [True]}}, "use true or false; it is read as false"),
        ({"kvstrata": {"no_persist": False}}, "no_persist=False: it is not understood"),
        ({"kvstrata": {"tiers": ["disk"]}}, r"list of names of secondary tiers \(fs, memory\)"),
        ({"kvstrata": {"tiers": None}}, r"tiers=None: use a list of names .*; it is read as \[\]"),
        ({"kvstrata": {"tiers": "all"}}, r"tiers='all': use a list .*; it is read as \[\]"),
        ({"kvstrata": {"tiers": [["fs"]]}}, r"it is read as \[\]"),
        ({"kvstrata": {"tiers": {"fs": True}}}, r"it is read as \[\]"),
        ({"kvstrata": {"exclude_tiers": ["fs"]}}, "exclude_tiers=.*: it is not understood"),
        ({"kvstrata": {"private": True}}, "not understood, .*; the wishes are persist, tiers, pin"),
        ({"kvstrata": {"store_fraction": 0.5}}, "; send kv_transfer_params.max_offload_tokens"),
        ({"kv_transfer_params": [{"persist": True}]}, "=.*: it is not understood"),
        ({"kv_transfer_params": "persist"}, "='persist': it is not understood"),
        (dict.fromkeys(map(str, range(2000)), 1), "1000=1: .*; send 1000 keys at most"),
        ({"store_fraction": 0.5}, "; send kv_transfer_params.max_offload_tokens"),
    ],
)
def test_what_is_not_understood_stays_out_of_all_tiers(
    params: dict[str, object], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    reader = ParameterReader(TIERS)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert reader.read(params) == NOWHERE
    (message,) = [record.getMessage() for record in caplog.records]
    assert re.search(says, message), message
    assert reader.wrong == 3


@pytest.mark.parametrize("value", [-1, float("nan"), True, 1e9, 10**400, "1e9", "10m", None, [5]])
def test_a_wrong_pin_pins_nothing(value: object, caplog: pytest.LogCaptureFixture) -> None:
    """It says nothing of where pages may go."""
    reader = ParameterReader(TIERS)
    with caplog.at_level(logging.WARNING):
        assert reader.read({"kvstrata": {"pin_seconds": value}}) == NO_PARAMETERS
    assert 'use "pin_seconds" with a number from 0 to 86400; nothing is' in caplog.text
    assert reader.wrong == 1
    assert reader.read({"kvstrata": {"pin_second": 5}}) == NO_PARAMETERS, "of which one is not sure"
    assert reader.wrong == 2


def test_one_wrong_pin_leaves_the_other_wishes() -> None:
    wishes = {"tiers": ["fs"], "pin_seconds": "long"}
    assert ParameterReader(TIERS).read({"kvstrata": wishes}) == FS


# What vLLM 0.31 to 0.33 and its connectors (NIXL, Mooncake, MoRIIO, LMCache, P2P, offloading) read
# from a request's kv_transfer_params, or write into it.
VLLM_KEYS = [
    "do_remote_prefill",
    "do_remote_decode",
    "remote_engine_id",
    "remote_request_id",
    "remote_block_ids",
    "remote_block_size",
    "remote_host",
    "remote_hosts",
    "remote_port",
    "remote_num_tokens",
    "remote_tp_size",
    "remote_dp_size",
    "remote_dp_size_local",
    "remote_dp_rank",
    "remote_dp_rank_override",
    "remote_notify_port",
    "remote_handshake_port",
    "remote_bootstrap_addr",
    "remote_blocks_expiry_time",
    "remote_prefiller",
    "remote_decoder",
    "remote_prefill_cached_tokens",
    "remote_kv_source",
    "tp_size",
    "pp_size",
    "dcp_size",
    "transfer_id",
    "is_request_leader",
    "_p_side_truncated",
    "_remote_blocks_processed",
    "prompt_token_ids",
    "hidden_states_path",
    "disagg_spec",
    "ret_first_tok",
    "lmcache.skip_save",
    "lmcache.tag.user",
    "priority",
    "num_lmcache_extra_cached_tokens",
    "max_offload_tokens",
    "max_load_tokens",
    "kv_load_tiers",
]


@pytest.mark.parametrize("value", [False, True, 0, "false", None, [], ["fs"], {"tiers": 7}])
def test_vllms_own_keys_are_never_taken_for_ours(value: object) -> None:
    reader = ParameterReader(TIERS)
    assert reader.read(dict.fromkeys(VLLM_KEYS, value)) is NO_PARAMETERS
    assert reader.wrong == 0


def test_each_form_is_warned_of_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock = [0.0]
    reader = ParameterReader(TIERS, lambda: clock[0])
    with caplog.at_level(logging.WARNING):
        for clock[0], warnings in ((0.0, 2), (59.0, 2), (60.0, 4), (61.0, 4), (120.0, 6)):
            reader.read({"persist": False})
            reader.read({"kvstrata": {"persist": "false"}})
            assert len(caplog.records) == warnings
    assert reader.wrong == 10


def test_clients_cannot_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    clock = [0.0]
    reader = ParameterReader(TIERS, lambda: clock[0])
    with caplog.at_level(logging.WARNING):
        for clock[0] in (0.0, 60.0):
            for number in range(1000):
                reader.read({"kvstrata": {f"{number}" * 1000: "x" * 10**5}})
    assert reader.wrong == 2000
    assert len(caplog.records) == 200
    assert max(len(record.getMessage()) for record in caplog.records) < 1000


NAMES = st.sampled_from(
    ["persist", "tiers", "pin_seconds", "kvstrata", "Kv_strata", "kv_transfer_params", "presist"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
WISHES = st.recursive(
    SCALARS | st.sampled_from(["true", " Yes", "false", "fs", 10**400, 1.0]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES | SCALARS, inner, max_size=3),
    max_leaves=4,
)


@given(params=st.dictionaries(NAMES | SCALARS, WISHES, max_size=3))
def test_nothing_raises(params: dict[object, object]) -> None:
    meant = ParameterReader(TIERS).read(params)  # type: ignore[arg-type]
    assert meant.tiers is None or meant.tiers <= set(TIERS)
    assert 0.0 <= meant.pin_seconds <= 86400.0


@given(wish=WISHES)
def test_only_a_plain_yes_persists(wish: object) -> None:
    plain = wish == 1 or (
        isinstance(wish, str) and wish.strip().lower() in ("true", "yes", "on", "1")
    )
    persists = ParameterReader(TIERS).read({"kvstrata": {"persist": wish}}).tiers is None
    assert persists is plain


def test_what_contains_itself_ends() -> None:
    params: dict[str, object] = {}
    params["kvstrata"] = params["kv_transfer_params"] = params["x"] = params
    assert ParameterReader(TIERS).read(params) == NOWHERE
