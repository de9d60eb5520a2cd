"""The eviction policies by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping

from kvstrata.offload.arc import ARC
from kvstrata.offload.auto import Auto
from kvstrata.offload.eviction import LRU, EvictionPolicy

_BUILT_IN: Mapping[str, type[EvictionPolicy]] = {"auto": Auto, "lru": LRU, "arc": ARC}


def policy_class(name: object) -> type[EvictionPolicy]:
    """The policy that `eviction_policy` asks for: a built-in name or "package.module:Class".

    Raises:
        ValueError: there is no such policy; names the key, the value and the remedy.
    """
    found = _BUILT_IN.get(name) if isinstance(name, str) else None
    if found is not None:
        return found
    wrong = f"eviction_policy={name!r}"
    module, _, attribute = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not module or not attribute:
        raise ValueError(
            f'{wrong}: use one of {", ".join(_BUILT_IN)}, or "package.module:Class" for your own'
        )
    try:
        imported = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the module is foreign code and may raise anything
        raise ValueError(
            f"{wrong} cannot be imported: {type(error).__name__}: {error}; "
            "give the path of a class that the engine's processes can import"
        ) from error
    if not isinstance(imported, type) or not issubclass(imported, EvictionPolicy):
        raise ValueError(
            f"{wrong} is no eviction policy: give a class derived from "
            f"{EvictionPolicy.__module__}:{EvictionPolicy.__name__}"
        )
    if inspect.isabstract(imported):
        missing = ", ".join(sorted(imported.__abstractmethods__))
        raise ValueError(f"{wrong} lacks {missing}: give a class that defines them")
    return imported
