"""The namespace: what two engines must have in common to share pages.

docs/namespace.md explains the rule; the files beside this one hold it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.kv_offload.config import OffloadingConfig

from kvstrata.kernels.geometry import OPAQUE, LayerShape
from kvstrata.offload.vllm_plugin.engine.errors import NamespaceError
from kvstrata.offload.vllm_plugin.namespace.device import device_fields
from kvstrata.offload.vllm_plugin.namespace.environment import environment
from kvstrata.offload.vllm_plugin.namespace.rule import (
    deciding_fields,
    is_cache_quantised,
    is_quantised,
)
from kvstrata.tiers.base import PageLayout, layouts_to_json
from kvstrata.tiers.page.identity import MAX_CONFIG_BYTES, config_text

FORMAT_VERSION = 2


def namespace_fields(
    config: OffloadingConfig,
    vllm_config: VllmConfig,
    layouts: Mapping[int, PageLayout],
    shapes: Mapping[int, Sequence[LayerShape]],
    content_orders: Mapping[str, str],
    weights: Mapping[str, str | None],
) -> dict[str, Any]:
    """The namespace as JSON-serialisable fields.

    Args:
        config: vLLM's offloading configuration.
        vllm_config: the engine's configuration.
        layouts: page layout by group.
        shapes: the layers of each group over all pipeline stages, in order.
        content_orders: content-order id by layer name.
        weights: the fields of `name_weights`.

    Raises:
        NamespaceError: a field that decides cannot be written down, or all are too long.
    """
    opaque = any(shape.content == OPAQUE for group in shapes.values() for shape in group)
    blocked = any(content_orders.values())
    fields: dict[str, Any] = {
        **computed_fields(config, vllm_config, weights),
        "device": device_fields(
            quantised=is_quantised(vllm_config) or is_cache_quantised(vllm_config)
        ),
        "pages": layouts_to_json(layouts),
        "tokens_per_block": (
            [group.tokens_per_block for group in config.groups] if blocked else None
        ),
        "groups": {
            str(group): {
                "layers": [shape.name for shape in shapes[group]],
                "orders": sorted({content_orders[shape.name] for shape in shapes[group]}),
            }
            for group in layouts
        },
        "topology": topology_fields(config, vllm_config) if opaque else None,
    }
    check_length(fields)
    return fields


def computed_fields(
    config: OffloadingConfig, vllm_config: VllmConfig, weights: Mapping[str, str | None]
) -> dict[str, Any]:
    """Those that say what is computed, and how chunks are named, whatever the form of pages.

    Raises:
        NamespaceError: a field that decides cannot be written down.
    """
    model = vllm_config.model_config
    return {
        "format_version": FORMAT_VERSION,
        **weights,
        "configuration": deciding_fields(vllm_config),
        "environment": environment(
            multimodal=getattr(model, "multimodal_config", None) is not None,
            quantised=is_quantised(vllm_config),
        ),
        "kv_dtype": config.model.dtype,
        "tokens_per_hash": config.cache.tokens_per_hash,
        "codec": "raw",
        "hash_algorithm": vllm_config.cache_config.prefix_caching_hash_algo,
        "hash_seed": os.environ.get("PYTHONHASHSEED", "vllm-default"),
    }


def topology_fields(config: OffloadingConfig, vllm_config: VllmConfig) -> dict[str, Any]:
    """Who holds which part of a page, and the order of axes in the caches."""
    parallel = config.parallel
    split = getattr(vllm_config, "parallel_config", None)
    return {
        "tp": parallel.tp_size,
        "pp": parallel.pp_size,
        "pcp": parallel.pcp_size,
        "dcp": parallel.dcp_size,
        "interleave": [
            getattr(split, name, None)
            for name in ("cp_kv_cache_interleave_size", "dcp_kv_cache_interleave_size")
        ],
        "layout": str(config.kv_cache_layout),
    }


def check_length(fields: Mapping[str, Any]) -> None:
    """Refuse a namespace that its file cannot hold.

    Raises:
        NamespaceError: naming the longest field.
    """
    size = len(config_text(fields))
    if size > MAX_CONFIG_BYTES:
        longest = max(fields, key=lambda name: len(config_text({name: fields[name]})))
        raise NamespaceError(
            f"what decides this model's KV takes {size} bytes to write down, most of them in "
            f"{longest!r}, and config.json takes {MAX_CONFIG_BYTES}: secondary_tiers cannot be "
            "used with it"
        )


def check_secondary_tiers(vllm_config: VllmConfig) -> None:
    """Refuse what would give pages names that mean nothing, or something else, elsewhere.

    Raises:
        NamespaceError: naming the setting and the remedy.
    """
    cache = vllm_config.cache_config
    model = getattr(vllm_config, "model_config", None)
    multimodal = getattr(model, "multimodal_config", None)
    if getattr(multimodal, "mm_processor_cache_gb", None) == 0 and not cache.enable_prefix_caching:
        # vllm/renderers/base.py, _process_mm_uuids, of 0.31 to 0.33
        raise NamespaceError(
            "mm_processor_cache_gb=0 without prefix caching makes vLLM name images, videos and "
            "audio by a counter that begins anew in every process, so secondary_tiers would give "
            "one image the KV of another: leave out --mm-processor-cache-gb 0 or "
            "--no-enable-prefix-caching (encoder-decoder models have neither cache)"
        )
    algorithm = cache.prefix_caching_hash_algo
    if "xxhash" in algorithm and "PYTHONHASHSEED" not in os.environ:
        raise NamespaceError(
            f"prefix_caching_hash_algo={algorithm!r} without PYTHONHASHSEED gives every process "
            "random chunk hashes, so secondary_tiers could never hit: set PYTHONHASHSEED to the "
            "same value in all instances, or use --prefix-caching-hash-algo sha256"
        )
