"""Keys that belong somewhere else, and where: a look-alike would only mislead."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping

from kvstrata.tiers.options import Option, options_of, use_instead
from kvstrata.tiers.registry import BUILT_IN, TierEntry, tier_class

# Each place, and keys of it that are given elsewhere.
_PLACES: Mapping[str, str] = {
    "it is a key of --kv-transfer-config itself, beside kv_connector_extra_config": (
        "kv_connector kv_role engine_id kv_connector_module_path"
    ),
    "it is a key of --kv-events-config": "enable_kv_cache_events publisher endpoint topic",
    "it is a key of a request's kv_transfer_params": (
        "max_offload_tokens max_load_tokens kv_load_tiers"
    ),
    'it is a key of a request: {"kv_transfer_params": {"kvstrata": {...}}}': "persist pin_seconds",
    "a key of vLLM's SimpleCPUOffloadConnector: pages are stored at once here; remove it": (
        "lazy_offload"
    ),
    "it is an option of vLLM's server: --shutdown-timeout 15": "shutdown_timeout",
    "a key of tiers that only vLLM's TieringOffloadingSpec has; remove it": (
        "store_config prefix host port backends"
    ),
}


def elsewhere(key: str, engine: Mapping[str, Option], *, in_tier: bool) -> str:
    """Where a key that is unknown here belongs, or what to use instead; "": nobody knows it.

    `engine` are the options of `kv_connector_extra_config`; `in_tier`: the key was found in an
    entry of `secondary_tiers`.
    """
    for place, keys in _PLACES.items():
        if key in keys.split():
            return place
    place, others = "of kv_connector_extra_config, beside secondary_tiers", engine
    if not in_tier:
        classes: list[type] = [TierEntry, *(tier_class({"type": x}).Options for x in BUILT_IN)]
        place, others = "of an entry of secondary_tiers", ChainMap(*map(options_of, classes))
    if key in others:
        return f"it is a key {place}"
    instead = use_instead(key, others)
    return f"{instead} {place}" if instead else ""
