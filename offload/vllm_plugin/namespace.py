"""The namespace: what two engines must have in common to share pages."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from vllm.config import ModelConfig, VllmConfig
from vllm.v1.kv_offload.config import OffloadingConfig

from kvstrata.kernels.geometry import OPAQUE, LayerShape
from kvstrata.offload.vllm_plugin.errors import NamespaceError as NamespaceError
from kvstrata.offload.vllm_plugin.updates import weights_fixed as weights_fixed
from kvstrata.offload.vllm_plugin.weights import name_weights
from kvstrata.offload.vllm_plugin.weights import weights_fingerprint as weights_fingerprint
from kvstrata.tiers.base import PageLayout, layouts_to_json

FORMAT_VERSION = 1
# Says where a configuration came from or how to print it, not what the model computes.
_NOT_CONTENT = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype"})


def namespace_fields(
    config: OffloadingConfig,
    vllm_config: VllmConfig,
    layouts: Mapping[int, PageLayout],
    shapes: Mapping[int, Sequence[LayerShape]],
    orders: Mapping[str, str],
    weights: Mapping[str, str | None] | None = None,
) -> dict[str, Any]:
    """The namespace as JSON-serialisable fields.

    Args:
        config: vLLM's offloading configuration.
        vllm_config: the engine's configuration.
        layouts: page layout by group.
        shapes: the layers of each group over all pipeline stages, in order.
        orders: content-order id by layer name.
        weights: the fields of `name_weights`; found out by this process alone if not given.
    """
    cache = vllm_config.cache_config
    model = vllm_config.model_config
    opaque = any(shape.content == OPAQUE for group in shapes.values() for shape in group)
    blocked = any(order for order in orders.values())
    parallel = config.parallel
    return {
        "format_version": FORMAT_VERSION,
        **(weights or name_weights(vllm_config).fields),
        "text_config": _config_digest(model),
        "kv_dtype": config.model.dtype,
        "tokens_per_hash": config.cache.tokens_per_hash,
        "pages": layouts_to_json(layouts),
        "tokens_per_block": (
            [group.tokens_per_block for group in config.groups] if blocked else None
        ),
        "groups": {
            str(group): {
                "layers": [shape.name for shape in shapes[group]],
                "orders": sorted({orders[shape.name] for shape in shapes[group]}),
            }
            for group in layouts
        },
        "topology": (
            {
                "tp": parallel.tp_size,
                "pp": parallel.pp_size,
                "pcp": parallel.pcp_size,
                "dcp": parallel.dcp_size,
                "layout": str(config.kv_cache_layout),
            }
            if opaque
            else None
        ),
        "codec": "raw",
        "hash_algorithm": cache.prefix_caching_hash_algo,
        "hash_seed": os.environ.get("PYTHONHASHSEED", "vllm-default"),
    }


def check_secondary_tiers(vllm_config: VllmConfig) -> None:
    """Refuse what would give pages names that other processes cannot know.

    Raises:
        NamespaceError: naming the setting and the remedy.
    """
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    if "xxhash" in algorithm and "PYTHONHASHSEED" not in os.environ:
        raise NamespaceError(
            f"prefix_caching_hash_algo={algorithm!r} without PYTHONHASHSEED gives every process "
            "random chunk hashes, so secondary_tiers could never hit: set PYTHONHASHSEED to the "
            "same value in all instances, or use --prefix-caching-hash-algo sha256"
        )


def _config_digest(model: ModelConfig) -> str:
    fields = {k: v for k, v in model.hf_text_config.to_dict().items() if k not in _NOT_CONTENT}
    text = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
