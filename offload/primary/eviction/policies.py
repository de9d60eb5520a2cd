"""The eviction policies by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from kvstrata.offload.primary.eviction.arc import ARC
from kvstrata.offload.primary.eviction.auto import Auto
from kvstrata.offload.primary.eviction.policy import LRU, EvictionPolicy
from kvstrata.tiers.options import ConfigError, WrongValue, nearest
from kvstrata.tiers.registry import derives_from, import_named

BUILT_IN: Mapping[str, type[EvictionPolicy]] = {"auto": Auto, "lru": LRU, "arc": ARC}
_STOCK_BASE = ("vllm.v1.kv_offload.cpu.policies.base", "CachePolicy")


def named_policy(name: object, module: object) -> tuple[str, str]:
    """What vLLM's `eviction_policy` and `cache_policy_module_path` ask for together.

    Returns:
        The policy in the words of `policy_class`; and, where it is one of vLLM's own kind, which
        knows slots and not requests and cannot be used here, the reason why "auto" is used.

    Raises:
        ConfigError: there is no such policy; names the key, the value and the remedy.
    """
    if module is None or (isinstance(name, str) and name in BUILT_IN):
        policy_class(name)
        return str(name), ""
    if not isinstance(module, str) or not module:
        remedy = 'the module of eviction_policy, such as "package.module", or remove the key'
        raise WrongValue("cache_policy_module_path", module, remedy)
    if not isinstance(name, str) or not name:
        raise WrongValue("eviction_policy", name, f"the name of a class in {module!r}")
    found = import_named(f"eviction_policy: {name!r}", module, name)
    if derives_from(found, _STOCK_BASE):
        return "auto", f"{module}:{name} is a policy for vLLM's own specs; auto is used"
    policy_class(f"{module}:{name}")
    return f"{module}:{name}", ""


def policy_class(name: object) -> type[EvictionPolicy]:
    """The policy that `eviction_policy` asks for: a built-in name or "package.module:Class".

    Raises:
        ConfigError: there is no such policy; names the key, the value and the remedy.
    """
    found = BUILT_IN.get(name) if isinstance(name, str) else None
    if found is not None:
        return found
    wrong = f"eviction_policy: {name!r}"
    module, _, attribute = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not module or not attribute:
        known = f"one of {', '.join(BUILT_IN)}{nearest(name, BUILT_IN)}"
        known += ', or "package.module:Class" for your own'
        raise WrongValue("eviction_policy", name, known)
    imported = import_named(wrong, module, attribute)
    if not isinstance(imported, type) or not issubclass(imported, EvictionPolicy):
        raise ConfigError(
            f"{wrong} is no eviction policy; give a class derived from "
            f"{EvictionPolicy.__module__}:{EvictionPolicy.__name__}"
        )
    if inspect.isabstract(imported):
        missing = ", ".join(sorted(imported.__abstractmethods__))
        raise ConfigError(f"{wrong} lacks {missing}; give a class that defines them")
    return imported
