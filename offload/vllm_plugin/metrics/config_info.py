"""The labels of `vllm:kv_offload_config_info`, by which vLLM 0.33 shows what an engine runs with.

One series for the primary tier, with the names that stock's has and every setting of
`kv_connector_extra_config` as it is in effect, and one for each secondary tier. What a secondary
tier is given beyond that stays out: it may be a password.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from vllm.v1.kv_offload.config import OffloadingConfig

from kvstrata.offload.config.offload_config import OffloadConfig
from kvstrata.tiers.registry import TierEntry

Labels = Mapping[str, str | int | float | bool]

PRIMARY = "primary"
_TIER = ("tier", "type", "medium")
_CPU = (
    "cpu_num_chunks",
    "cpu_blocks_per_chunk",
    "cpu_kv_cache_size_bytes",
    "cpu_kv_cache_size_tokens",
)
# settings that are there as something else, or none
_OTHERWISE = ("cpu_bytes", "tiers", "without_effect")
_SETTINGS = tuple(each.name for each in fields(OffloadConfig) if each.name not in _OTHERWISE)

CONFIG_INFO_KEYS = (*_TIER, *_CPU, *_SETTINGS)


def config_info(
    config: OffloadingConfig,
    settings: OffloadConfig,
    tiers: Iterable[tuple[TierEntry, str | None]],
    *,
    slots: int,
    slot_bytes: int,
    weights_fixed: bool,
) -> list[Labels]:
    """The labels of each series.

    Args:
        config: vLLM's.
        settings: ours.
        tiers: the secondary tiers that are in use, each with its medium.
        slots: pages of the primary tier.
        slot_bytes: bytes of each.
        weights_fixed: what was decided where nothing is configured.
    """
    primary: Labels = {
        "tier": PRIMARY,
        "type": PRIMARY,
        "medium": "CPU",
        "cpu_num_chunks": slots,
        "cpu_blocks_per_chunk": config.cache.blocks_per_chunk,
        "cpu_kv_cache_size_bytes": slots * slot_bytes,
        "cpu_kv_cache_size_tokens": _tokens(config, slots),
        **{name: getattr(settings, name) for name in _SETTINGS},
        "weights_fixed": weights_fixed,
    }
    secondary: list[Labels] = [
        {
            "tier": entry.name,
            "type": str(entry.entry["type"]),
            "medium": str(medium),
            "store_threshold": entry.store_threshold,
            "max_tracker_size": entry.max_tracker_size,
        }
        for entry, medium in tiers
    ]
    return [primary, *secondary]


def _tokens(config: Any, slots: int) -> int:  # fields that vLLM has since 0.33
    """Tokens that the primary tier holds of requests of the longest kind."""
    longest = config.model.max_model_len
    pages = 0
    for group in config.groups:
        needed = -(-longest // (group.tokens_per_block * config.cache.blocks_per_chunk))
        window = group.sliding_window_size_in_chunks
        pages += needed if window is None else min(needed, window)
    return slots * longest // pages if pages else 0
