"""Keys that belong somewhere else, and where: a look-alike would only mislead."""

from __future__ import annotations

from collections.abc import Mapping

_KV_TRANSFER = "of --kv-transfer-config itself, beside kv_connector_extra_config"
_EVENTS = "of --kv-events-config"
_REQUEST = "of a request's kv_transfer_params"
_WISH = 'of a request: {"kv_transfer_params": {"kvstrata": {...}}}'
_TIER = "of an entry of secondary_tiers"
_ALL_WORKERS = "use cpu_bytes_to_use, the bytes of all workers together"

_ANYWHERE: Mapping[str, str] = {
    **dict.fromkeys(
        ("kv_connector", "kv_role", "engine_id", "kv_connector_module_path"),
        f"it is a key {_KV_TRANSFER}",
    ),
    **dict.fromkeys(
        ("enable_kv_cache_events", "publisher", "endpoint", "topic"), f"it is a key {_EVENTS}"
    ),
    **dict.fromkeys(
        ("max_offload_tokens", "max_load_tokens", "kv_load_tiers"), f"it is a key {_REQUEST}"
    ),
    **dict.fromkeys(("persist", "pin_seconds"), f"it is a key {_WISH}"),
    **dict.fromkeys(
        ("num_cpu_blocks", "cpu_bytes_to_use_per_rank", "cpu_bytes_per_rank"), _ALL_WORKERS
    ),
    **dict.fromkeys(
        ("kv_offloading_size", "cpu_swap_space_gb", "swap_space", "max_local_cpu_size"),
        'use cpu_bytes_to_use, for example "8GiB"',
    ),
    "lazy_offload": "a key of vLLM's SimpleCPUOffloadConnector: pages are stored at once here; "
    "remove it",
    **dict.fromkeys(
        ("disk_capacity_bytes", "max_size", "max_disk_gib", "size", "capacity", "quota"),
        "use max_bytes in the fs tier's entry of secondary_tiers",
    ),
    "tiers": "use secondary_tiers",
    "shutdown_timeout": "it is an option of vLLM's server: --shutdown-timeout 15",
}


_OF_TIERS = (
    *("type", "module_path", "enable_kv_events", "locality"),
    *("root_dir", "n_read_threads", "n_write_threads", "file_mode", "dir_mode", "durability", "io"),
    *("max_bytes", "max_files", "min_free_bytes"),
    *("store_config", "prefix", "io_threads", "host", "port", "backends"),
)


def elsewhere(key: str, *, in_tier: bool, engine_keys: tuple[str, ...]) -> str | None:
    """Where a key that is unknown here belongs, or what to use instead; None: nobody knows it.

    Args:
        key: the unknown key.
        in_tier: it was found in an entry of `secondary_tiers`.
        engine_keys: the keys of `kv_connector_extra_config`.
    """
    if found := _ANYWHERE.get(key):
        return found
    if in_tier and key in engine_keys:
        return "it is a key of kv_connector_extra_config, beside secondary_tiers"
    if not in_tier and key in _OF_TIERS:
        return f"it is a key {_TIER}"
    return None
