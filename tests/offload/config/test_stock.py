"""Configurations for vLLM's own specs, with another `spec_name`."""

import sys
from pathlib import Path
from typing import Any

import pytest

from kvstrata.offload.config.offload_config import (
    OffloadConfig,
    TierEntry,
    parse_config,
)
from kvstrata.tiers.options import ConfigError

FS = {"type": "fs", "root_dir": "/mnt/kv_cache", "n_read_threads": 32, "n_write_threads": 16}
BACKPRESSURE = {"backpressure_cls": "EMABackpressureDetector", "policy_cls": "DropStorePolicy"}

# docs/features/kv_offloading_usage.md and disagg_prefill.md of vLLM 0.31 to 0.33: each example.
DOCUMENTED: list[dict[str, Any]] = [
    {"block_size": 64, "cpu_bytes_to_use": 1000000000},
    {
        "cpu_bytes_to_use": 10737418240,
        "block_size": 16,
        "eviction_policy": "lru",
        "secondary_tiers": [FS],
    },
    {
        "cpu_bytes_to_use": 64000000000,
        "canonical_layout": True,
        "secondary_tiers": [{"type": "fs", "root_dir": "/mnt/kv"}],
    },
    {
        "cpu_bytes_to_use": 10737418240,
        "eviction_policy": "MyCachePolicy",
        "cache_policy_module_path": "my_package.my_module",
    },
    # Every key of its tables, at its default and at another value.
    {
        "cpu_bytes_to_use": 1073741824.0,
        "blocks_per_chunk": 1,
        "eviction_policy": "lru",
        "store_threshold": 0,
        "max_tracker_size": 64000,
        "secondary_tiers": [],
        "tier_poll_interval_s": 0.001,
        "offload_prompt_only": True,
        "sync_load_budget_bytes": 0,
        "self_describing_kv_events": False,
    },
    {
        "cpu_bytes_to_use": 2e9,
        "blocks_per_chunk": 4,
        "eviction_policy": "arc",
        "secondary_tiers": [{**FS, "enable_kv_events": True, "locality": "REMOTE"}],
        "tier_poll_interval_s": 0,
        "offload_prompt_only": False,
        "sync_load_budget_bytes": 1 << 28,
        "self_describing_kv_events": True,
    },
    # Not in its documents, and read by its code.
    {
        "cpu_bytes_to_use": 10737418240,
        "backpressure": BACKPRESSURE,
        "secondary_tiers": [
            {**FS, "backpressure": {"high_water_s": 0.05}},
            {"type": "fs", "root_dir": "/mnt/other", "backpressure": {}, "locality": None},
        ],
    },
]

POLICY = """
class CachePolicy: __module__ = "vllm.v1.kv_offload.cpu.policies.base"
class MyCachePolicy(CachePolicy): pass
from kvstrata.offload.primary.eviction.policy import LRU
class Ours(LRU): pass
class Neither: pass
"""


@pytest.fixture(autouse=True)
def my_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module that vLLM's documents name; its base class stands for vLLM's."""
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "my_module.py").write_text(POLICY)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_package", "my_package.my_module"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def parse(**extra: Any) -> OffloadConfig:
    return parse_config({"spec_name": "KVStrataSpec", "cpu_bytes_to_use": "1GiB", **extra})


@pytest.mark.parametrize("extra", DOCUMENTED, ids=range(len(DOCUMENTED)))
def test_each_documented_configuration_is_taken(extra: dict[str, Any]) -> None:
    config = parse(**extra)
    assert config.cpu_bytes == int(extra["cpu_bytes_to_use"])
    assert len(config.tiers) == len(extra.get("secondary_tiers", []))


def test_what_does_nothing_is_told_with_the_reason() -> None:
    config = parse(**DOCUMENTED[-1], canonical_layout=True, tier_poll_interval_s=1e-3)
    assert config.without_effect == {
        "canonical_layout": "pages are always canonical",
        "backpressure": "a slow tier is always held back, by its measured speed",
        "tier_poll_interval_s": "tiers work between steps without being polled",
        **{
            f"secondary_tiers[{index}].backpressure": "a slow tier is always held back, by its "
            "measured speed"
            for index in (0, 1)
        },
    }
    assert parse().without_effect == {}


def test_a_tier_says_where_it_is_and_whether_of_its_events() -> None:
    entries = [
        {"type": "memory", "locality": "REMOTE", "enable_kv_events": False},
        {"type": "memory", "max_bytes": 5, "tier_poll_interval_s": 0.001},
    ]
    first, second = parse(secondary_tiers=entries).tiers
    assert first == TierEntry("memory", entries[0], kv_events=False, locality="REMOTE")
    assert second == TierEntry("memory-2", entries[1], kv_events=True, locality=None)


@pytest.mark.parametrize(
    ("name", "policy", "said"),
    [
        ("MyCachePolicy", "auto", {"eviction_policy"}),
        ("Ours", "my_package.my_module:Ours", set()),
        ("arc", "arc", set()),
    ],
)
def test_a_policy_by_its_module(name: str, policy: str, said: set[str]) -> None:
    config = parse(eviction_policy=name, cache_policy_module_path="my_package.my_module")
    assert (config.eviction_policy, config.without_effect.keys()) == (policy, said)


@pytest.mark.parametrize(
    ("name", "module", "words"),
    [
        ("Neither", "my_package.my_module", "my_module:Neither' is no eviction policy"),
        ("Absent", "my_package.my_module", "eviction_policy: 'Absent' cannot be imported"),
        ("", "my_package.my_module", "eviction_policy: '' is wrong; give the name of a class"),
        ("Ours", "", "cache_policy_module_path: '' is wrong; give"),
    ],
)
def test_a_policy_that_is_not_there(name: str, module: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(eviction_policy=name, cache_policy_module_path=module)
