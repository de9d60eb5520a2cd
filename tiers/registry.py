"""From an entry of `secondary_tiers` to the tier's class."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from kvstrata.tiers.base import SecondaryTier, TierConfigError
from kvstrata.tiers.options import COMMON_KEYS, nearest

ENTRY_POINT_GROUP = "kvstrata.tiers"

# short name -> "module:class", imported when asked for
BUILT_IN: Mapping[str, str] = {
    "fs": "kvstrata.tiers.fs.tier:FsTier",
    "memory": "kvstrata.tiers.memory:MemoryTier",
}

# Tiers of vLLM's own TieringOffloadingSpec that have no counterpart here.
_STOCK = ("example", "kvcr", "obj", "p2p")
_STOCK_BASE = ("vllm.v1.kv_offload.tiering.base", "SecondaryTierManager")


def tier_class(entry: Mapping[str, Any]) -> type[SecondaryTier]:
    """The class that an entry of `secondary_tiers` asks for.

    `type` is the class name where `module_path` is given; otherwise it is a built-in short
    name or the name of an entry point in the group `kvstrata.tiers`.

    Raises:
        TierConfigError: no such tier (the known ones are listed), it cannot be imported, or
            it is not a `SecondaryTier`.
    """
    name = entry.get("type")
    if not isinstance(name, str) or not name:
        wrong = f'"type": {name!r} is wrong' if "type" in entry else '"type" is missing'
        raise TierConfigError(
            f"{wrong}; give one of {', '.join(_known())}, or a class name together with module_path"
        )
    module = entry.get("module_path")
    if module is not None:
        if not isinstance(module, str) or not module:
            raise TierConfigError(f"module_path: {module!r} is wrong; give an importable module")
        return _import(f"{module}:{name}", name)
    if name in BUILT_IN:
        return _import(BUILT_IN[name], name)
    for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        return _import(point.value, name)
    known = _known()
    if name in _STOCK:
        raise TierConfigError(
            f"type {name!r} is a tier of vLLM's own TieringOffloadingSpec, which kvstrata does not "
            f"have; known types: {', '.join(known)}; use one of them, or remove the entry"
        )
    raise TierConfigError(
        f"unknown type {name!r}{nearest(name, known)}; known types: "
        f"{', '.join(known)}; for a class of your own give module_path as well"
    )


def tier_options(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry without the keys that every tier has: what the tier's class receives."""
    return {key: value for key, value in entry.items() if key not in COMMON_KEYS}


def _known() -> list[str]:
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def _import(target: str, name: str) -> type[SecondaryTier]:
    module, _, attribute = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the module is foreign code and may raise anything
        raise TierConfigError(
            f"type {name!r} cannot be imported from {module!r}: {type(error).__name__}: {error}; "
            "give a module and a class of it that the engine's processes can import"
        ) from error
    if isinstance(found, type) and any(
        (base.__module__, base.__name__) == _STOCK_BASE for base in found.__mro__
    ):
        raise TierConfigError(
            f"{target!r} is a tier for vLLM's own TieringOffloadingSpec; kvstrata needs a subclass "
            "of kvstrata.tiers.base.SecondaryTier"
        )
    if not isinstance(found, type) or not issubclass(found, SecondaryTier):
        raise TierConfigError(f"{target!r} is not a subclass of kvstrata.tiers.base.SecondaryTier")
    return found
