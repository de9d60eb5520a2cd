"""What vLLM 0.33 shows of an engine's configuration."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from vllm.v1.kv_offload.base import OffloadingSpec  # noqa: E402

from kvstrata.offload.vllm_plugin.metrics.config_info import CONFIG_INFO_KEYS  # noqa: E402
from tests.offload.vllm_plugin.test_other_kinds_of_cache import full, window  # noqa: E402

if not hasattr(OffloadingSpec, "config_info_keys"):
    pytest.skip("vLLM has no config_info before 0.33", allow_module_level=True)


def test_every_setting_is_shown(start: Callable[..., Any], tmp_path: Path) -> None:
    files = {"type": "fs", "root_dir": str(tmp_path), "store_threshold": 2}
    extra = {"eviction_policy": "arc", "audit_fraction": 0.5, "secondary_tiers": [files]}
    engine = start({"l": (full(), "FLASH_ATTN"), "w": (window(), "FLASH_ATTN")}, extra=extra)
    half = engine._scheduler_half()
    stats = half.get_stats()
    primary, tier = half.manager.config_info()
    assert [dict(primary), dict(tier)] == stats.data["info"], "it is on the first statistics"
    assert primary.keys() == set(CONFIG_INFO_KEYS), "else vLLM warns of what is never filled"
    assert (primary["tier"], primary["eviction_policy"], primary["audit_fraction"]) == (
        *("primary", "arc"),
        0.5,
    )
    slots = engine.manager.primary.slots
    assert primary["cpu_num_chunks"] == slots and primary["weights_fixed"] is True
    # 704 tokens take 22 pages of the full group, and of the other those of its window
    windowed = primary["cpu_kv_cache_size_tokens"]
    assert slots * 704 // 44 < windowed < slots * 704 // 22
    assert tier == {
        "tier": "fs",
        "type": "fs",
        "medium": "STORAGE",
        "store_threshold": 2,
        "max_tracker_size": 64_000,
    }
    assert str(tmp_path) not in str(stats.data)
