"""`kv_connector_extra_config`: defaults, and one clear error for everything that is wrong."""

import os
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.kernels.gpu.transport import Transport
from kvstrata.offload.config.offload_config import (
    TRANSPORTS,
    OffloadConfig,
    TierEntry,
    parse_config,
)
from kvstrata.tiers.options import ConfigError


def parse(**extra: Any) -> OffloadConfig:
    """The configuration with a valid size and the given keys."""
    return parse_config({"cpu_bytes_to_use": "1GiB", **extra})


def test_defaults() -> None:
    assert parse() == OffloadConfig(
        cpu_bytes=2**30,
        eviction_policy="auto",
        store_threshold=0,
        max_tracker_size=64_000,
        tiers=(),
        promotion_fraction=0.5,
        lookup_deadline_s=1.0,
        promotion_deadline_s=10.0,
        weights_fixed=None,
        lora_paths_immutable=False,
        transport="auto",
    )


def test_every_key_is_read() -> None:
    found = parse(
        spec_name="KVStrataSpec",
        spec_module_path="kvstrata.offload.vllm_plugin.spec",
        cpu_bytes_to_use=12_345_678,
        blocks_per_chunk=4,
        eviction_policy="arc",
        store_threshold=2,
        max_tracker_size=7,
        offload_prompt_only=False,
        self_describing_kv_events=True,
        sync_load_budget_bytes=0,
        secondary_tiers=[{"type": "memory", "max_bytes": "2MiB"}],
        promotion_fraction=1,
        lookup_deadline_s=0.25,
        promotion_deadline_s=3600,
        weights_fixed=False,
        lora_paths_immutable=True,
        transport="zero-copy",
    )
    assert found == OffloadConfig(
        cpu_bytes=12_345_678,
        eviction_policy="arc",
        store_threshold=2,
        max_tracker_size=7,
        tiers=(TierEntry("memory", {"type": "memory", "max_bytes": "2MiB"}),),
        promotion_fraction=1.0,
        lookup_deadline_s=0.25,
        promotion_deadline_s=3600.0,
        weights_fixed=False,
        lora_paths_immutable=True,
        transport="zero-copy",
    )
    assert isinstance(found.promotion_fraction, float)


def test_transports_are_those_of_the_pipeline() -> None:
    assert ("auto", *Transport) == TRANSPORTS


def test_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        parse().cpu_bytes = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("written", "size"),
    [
        *[(2**20, 2**20), (2**40, 2**40), ("8GiB", 2**33), ("8Gi", 2**33), ("8G", 8 * 10**9)],
        *[("1.5 MB", 1_500_000), (" 10000000 ", 10**7), ("1tib", 2**40)],
        *[(8e9, 8 * 10**9), (8.3 * 2**30, int(8.3 * 2**30))],  # --kv-offloading-size multiplies
    ],
)
def test_sizes(written: Any, size: int) -> None:
    assert parse(cpu_bytes_to_use=written).cpu_bytes == size


NAN, INF = float("nan"), float("inf")
HUGE = 10**400  # too large for a float
NOT_COUNTS = [True, -1, 1.0, "2", None, [], NAN]
NOT_SHARES = [True, 0, -0.1, 1.01, NAN, INF, -INF, HUGE, -HUGE, "0.5", None, []]
NOT_SECONDS = [False, 0, -1, 3601, NAN, INF, -INF, HUGE, "1", "1s", None, {}]
NOT_FLAGS = [0, 1, "true", "false", None, []]
BAD: dict[str, list[Any]] = {
    "cpu_bytes_to_use": [
        *(0, -1, "-8GiB", "0GiB", "", "GiB", "8 giga", "8GiBs", "eight", "1e9", "0x10", "nan"),
        *(True, False, 1.5, NAN, INF, [], {}, 2**60 + 1, "1048577TiB", HUGE, "9" * 400),
    ],
    "block_size": [0, *NOT_COUNTS[:4], *NOT_COUNTS[5:]],
    "blocks_per_chunk": [0, *NOT_COUNTS[:4], *NOT_COUNTS[5:], 2.7],
    "eviction_policy": ["LRU", "fifo", "", None, 1, ["lru"], {}, "absent:Policy", "enum:Enum"],
    "store_threshold": NOT_COUNTS,
    "max_tracker_size": [0, *NOT_COUNTS],
    "promotion_fraction": NOT_SHARES,
    "pin_fraction": [share for share in NOT_SHARES if share != 0],
    "lookup_deadline_s": NOT_SECONDS,
    "promotion_deadline_s": NOT_SECONDS,
    "weights_fixed": [flag for flag in NOT_FLAGS if flag is not None],
    "lora_paths_immutable": NOT_FLAGS,
    "record": ["", "requests.jsonl", "./requests", "/tmp/", "~absent/x", "/a\0b", 1, True, []],
    "transport": ["DIRECT", "dma", "zero_copy", "", None, 1, ["direct"], {}],
    "offload_prompt_only": NOT_FLAGS,
    "self_describing_kv_events": NOT_FLAGS,
    "secondary_tiers": ["fs", {"type": "fs"}, None, 3, True],
}


def test_pins_can_be_turned_off() -> None:
    assert parse(pin_fraction=0).pin_fraction == 0.0
    with pytest.raises(ConfigError, match=r"pin_fraction: -1 is wrong; give a number from 0 to 1$"):
        parse(pin_fraction=-1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param(key, value, id=f"{key}-{index}")
        for key, values in BAD.items()
        for index, value in enumerate(values)
    ],
)
def test_bad_value_is_one_error_with_key_value_and_remedy(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(**{key: value})
    text = str(caught.value)
    assert text.startswith(key)
    assert repr(value) in text
    assert "give " in text
    assert "\n" not in text


def test_missing_size() -> None:
    for extra in ({}, {"cpu_bytes_to_use": None}):
        with pytest.raises(ConfigError, match=r"cpu_bytes_to_use is missing.*8GiB"):
            parse_config(extra)


def test_both_chunk_sizes() -> None:
    with pytest.raises(ConfigError, match=r"block_size: 64 and blocks_per_chunk: 2.*remove one"):
        parse(block_size=64, blocks_per_chunk=2)


def test_none_is_no_chunk_size() -> None:
    assert parse(block_size=None, blocks_per_chunk=2) == parse()
    assert parse(block_size=64, blocks_per_chunk=None) == parse()


@pytest.mark.parametrize("value", [False, None, "true"])
def test_another_layout_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"canonical_layout: .*remove the key"):
        parse(canonical_layout=value)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("cpu_bytes", "cpu_bytes_to_use"),
        ("cpu_byte_to_use", "cpu_bytes_to_use"),
        ("cpu", "cpu_bytes_to_use"),
        ("secondary_tier", "secondary_tiers"),
        ("evictionPolicy", "eviction_policy"),
        ("weight_fixed", "weights_fixed"),
        ("block_per_chunk", "blocks_per_chunk"),
        ("lookup_deadline", "lookup_deadline_s"),
    ],
)
def test_unknown_key_names_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown key '{wrong}' \(did you mean '{right}'\?\)"):
        parse(**{wrong: 1})


def test_unknown_key_that_is_near_nothing() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'zzz'; known keys: .*weights_fixed"):
        parse(zzz=1)


# -- secondary tiers --------------------------------------------------------------


def test_tiers_of_one_type_get_distinct_names() -> None:
    tiers = parse(
        secondary_tiers=[
            {"type": "memory"},
            {"type": "fs", "root_dir": "/a"},
            {"type": "memory", "max_bytes": 5},
            {"type": "fs", "root_dir": "/b"},
            {"type": "memory", "max_bytes": 6},
        ]
    ).tiers
    assert [tier.name for tier in tiers] == ["memory", "fs", "memory-2", "fs-2", "memory-3"]
    assert tiers[2].entry == {"type": "memory", "max_bytes": 5}


def test_a_tier_listed_twice_is_refused() -> None:
    entry = {"type": "fs", "root_dir": "/a"}
    with pytest.raises(ConfigError, match=r"secondary_tiers\[1\]: .*'/a'.* listed twice.*remove"):
        parse(secondary_tiers=[entry, dict(entry)])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"root_dir": "/tmp/x1"}, {"root_dir": "/tmp/x1/"}),
        ({"root_dir": "/tmp/x1"}, {"root_dir": "/tmp/./y/../x1"}),
        ({"root_dir": "~/x1"}, {"root_dir": os.path.expanduser("~/x1")}),
        ({"root_dir": ["/a/", "/b"]}, {"root_dir": ["/a", "/b/"]}),
        ({"root_dir": "/a"}, {"root_dir": "/a/", "store_threshold": 2}),
        (
            {"root_dir": "/a"},
            {"root_dir": "/a/", "type": "FsTier", "module_path": "kvstrata.tiers.fs.tier"},
        ),
    ],
)
def test_a_tier_listed_twice_in_other_words_is_refused(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"secondary_tiers\[1\]: .* (listed twice|lead to one)"):
        parse(secondary_tiers=[{"type": "fs", **first}, {"type": "fs", **second}])


def test_tiers_on_neighbouring_directories_are_two() -> None:
    roots = ["/tmp/x1", "/tmp/x1-inner", "/tmp/x2/"]
    tiers = parse(secondary_tiers=[{"type": "fs", "root_dir": root} for root in roots]).tiers
    assert [tier.entry["root_dir"] for tier in tiers] == roots, "as the user wrote them"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("/a", "/a/b"),
        ("/a/b", "/a"),
        ("~/kv/x", os.path.expanduser("~/kv")),
        (["/b", "/a/b/"], ["/c", "/a/b/../b/c"]),
    ],
)
def test_tiers_one_in_the_other_are_refused(first: Any, second: Any) -> None:
    roots = [{"type": "fs", "root_dir": root} for root in (first, second)]
    with pytest.raises(ConfigError, match=r"secondary_tiers\[1\]: .* one into the other"):
        parse(secondary_tiers=roots)


def test_one_directory_with_other_options_is_one_tier() -> None:
    first = {"type": "fs", "root_dir": "/a", "n_read_threads": 8}
    with pytest.raises(ConfigError, match=r"secondary_tiers\[1\]: '/a' and '/a' lead to one"):
        parse(secondary_tiers=[first, {"type": "fs", "root_dir": ["/b", "/a"]}])


def test_entry_is_a_copy() -> None:
    entry = {"type": "memory"}
    config = parse(secondary_tiers=[entry])
    entry["type"] = "gone"
    assert config.tiers[0].entry == {"type": "memory"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("fs", r"secondary_tiers\[1\]: 'fs' is wrong; give an object"),
        (None, r"secondary_tiers\[1\]: None is wrong; give an object"),
        ({}, r"secondary_tiers\[1\]: \"type\" is missing; give one of fs, memory"),
        ({"type": 3}, r"secondary_tiers\[1\]: .*\"type\": 3 is wrong"),
        ({"type": "sf"}, r"secondary_tiers\[1\]: .*unknown type 'sf'.*known types: fs, memory"),
        ({"type": "memroy"}, r"did you mean 'memory'\?"),
        ({"type": "fs"}, r"secondary_tiers\[1\]: .*root_dir"),
        ({"type": "fs", "root_dir": 5}, r"secondary_tiers\[1\]: .*root_dir.*5"),
        ({"type": "fs", "root_dri": "/a"}, r"unknown key 'root_dri' \(did you mean 'root_dir'"),
        (
            {"type": "fs", "root_dir": "/a", "store_treshold": 2},
            r"unknown key 'store_treshold' \(did you mean 'store_threshold'\?\); known keys: "
            r".*max_tracker_size.*module_path.*root_dir.*store_threshold.*type$",
        ),
        (
            {"type": "memory", "modulepath": "x"},
            r"'modulepath' \(did you mean 'module_path'\?\)",
        ),
        ({"type": "memory", "max_bytes": -1}, r"secondary_tiers\[1\]: max_bytes: -1 is not pos"),
        ({"type": "X", "module_path": "no.such.module"}, r"'X' cannot be imported from 'no\.such"),
        ({"type": "X", "module_path": "json"}, r"'X' cannot be imported from 'json'"),
        ({"type": "loads", "module_path": "json"}, r"'json:loads' is not a subclass"),
        ({"type": "X", "module_path": 1}, r"module_path: 1 is wrong"),
    ],
)
def test_bad_tier(entry: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(secondary_tiers=[{"type": "memory"}, entry])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(BAD)), json_values, max_size=4))
def test_any_json_is_a_configuration_or_a_config_error(extra: dict[str, Any]) -> None:
    try:
        parse_config(extra)
    except ConfigError as error:
        assert str(error)
