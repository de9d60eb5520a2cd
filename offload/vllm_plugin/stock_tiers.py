"""Our tiers for vLLM's own manager: `KVStrataFs` and others in a `TieringOffloadingSpec`.

    {"type": "KVStrataFs", "module_path": "kvstrata.offload.vllm_plugin.stock_tiers",
     "root_dir": "/mnt/kv", "max_bytes": "50%"}

There is a class for each tier that kvstrata knows by a short name, those of installed packages
included; it is made when vLLM asks this module for it. docs/stock.md says what such a tier does.
"""

from __future__ import annotations

import functools

from vllm.v1.kv_offload.base import Medium

from kvstrata.offload.config.stock_entry import check_name
from kvstrata.offload.vllm_plugin.engine.stock.tier import StockTier
from kvstrata.tiers.options import ConfigError
from kvstrata.tiers.registry import stock_names, tier_class


@functools.cache
def __getattr__(name: str) -> type[StockTier]:
    """The class of this name; AttributeError for any that is no tier's."""
    if name.startswith("__"):
        raise AttributeError(name)
    try:
        check_name(name)
    except ConfigError as error:
        raise AttributeError(str(error)) from None
    medium = tier_class({"type": stock_names()[name]}).medium
    members = {"medium": Medium(medium) if medium else None, "__module__": __name__}
    return type(name, (StockTier,), members)
