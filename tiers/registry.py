"""An entry of `secondary_tiers`: what any may say, and from it to the tier's class."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass
from functools import partial
from importlib.metadata import entry_points
from typing import Any, cast

from kvstrata.tiers.base import LOCALITIES, SecondaryTier, TierConfigError
from kvstrata.tiers.options import (
    WrongValue,
    nearest,
    option,
    options_of,
    or_none,
    parse_any,
    parse_choice,
    parse_count,
    parse_flag,
    parse_number,
)

ENTRY_POINT_GROUP = "kvstrata.tiers"

# short name -> "module:class", imported when asked for
BUILT_IN: Mapping[str, str] = {
    "fs": "kvstrata.tiers.fs.tier:FsTier",
    "memory": "kvstrata.tiers.memory:MemoryTier",
    "pool": "kvstrata.tiers.pool.tier:PoolTier",
    "object": "kvstrata.tiers.object.tier:ObjectTier",
    "valkey": "kvstrata.tiers.valkey.tier:ValkeyTier",
    "mooncake": "kvstrata.tiers.mooncake.tier:MooncakeTier",
}

# What people call a type, in letters and digits.
_CALLED: Mapping[str, re.Pattern[str]] = {
    "fs": re.compile(
        "(local|posix)?(file|filesystem|files|dir|directory|folder|disk|ssd|nvme|nfs)[0-9]*"
    ),
    "object": re.compile(
        "(aws|amazon)?s3a?|(google)?gcs?|gs|azure(blob)?|azblob|az|abfss?|buckets?|blobs?|minio|"
        "ceph|r2|(object|blob|cloud|bucket)(s|store|storage)?"
    ),
    "valkey": re.compile("(redis|valkey|keydb|elasticache|memorydb)[a-z]*"),
    "mooncake": re.compile("(kv)?mooncake[a-z]*|mc(store)?"),
}
# Tiers of vLLM's own TieringOffloadingSpec, and what makes a tier for it one for us. This folder
# does not know vLLM: it is imported when asked for.
STOCK = ("example", "kvcr", "obj", "p2p")
_STOCK_BASE = ("vllm.v1.kv_offload.tiering.base", "SecondaryTierManager")
_STOCK_TIERS = "kvstrata.offload.vllm_plugin.foreign_tiers.classes"
# Where that spec finds our tiers, which are called `KVStrataFs` and so on there.
STOCK_SPEC = "TieringOffloadingSpec"
STOCK_MODULE = "kvstrata.offload.vllm_plugin.stock_tiers"
_THERE = "KVStrata"


def _check_backpressure(key: str, value: object) -> None:
    if value is not None and not isinstance(value, Mapping):
        raise WrongValue(key, value, "an object, or remove the key")


def _check_interval(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 3600:
        raise WrongValue(key, value, "a number, or remove the key")


@dataclass(frozen=True, slots=True)
class TierEntry:
    """One element of `secondary_tiers`, checked. `entry` is as the user wrote it.

    Its options are those that a tier of any type may have; they are not the tier's own.
    `store_threshold` and `max_tracker_size` mean for this tier what they mean for the engine.
    """

    name: str
    entry: Mapping[str, Any]
    type: InitVar[Any] = option(
        parse_any,
        "`fs`, `pool`, `object`, `valkey`, `mooncake`, `memory`, one of an installed package, "
        "a class, or one of vLLM's own ([tiers.md](tiers.md#vllms-own-tiers)): `p2p`, `obj`, "
        "`kvcr`, `example`",
        None,
        shown="required",
    )
    module_path: InitVar[Any] = option(parse_any, "the module of the class that `type` names", None)
    store_threshold: int = option(
        partial(parse_count, least=0, most=1000),
        "store a chunk only from this many offers on; 0 and 1: at once",
        0,
    )
    max_tracker_size: int = option(
        partial(parse_count, most=10**9), "how many keys that counting remembers", 64_000
    )
    kv_events: bool = option(
        parse_flag,
        "false: no KV events of this tier's pages, where events are on",
        True,
        key="enable_kv_events",
    )
    required: bool | None = option(
        or_none(parse_flag),
        "false: an engine starts without a tier that cannot be used yet, and uses it from when it "
        "can be",
        None,
        shown="true; false for a tier on other machines",
    )
    lookup_deadline_s: float | None = option(
        or_none(partial(parse_number, most=3600.0)),
        "as the engine's, for this tier",
        None,
        shown="the engine's",
    )
    promotion_deadline_s: float | None = option(
        or_none(partial(parse_number, most=3600.0)),
        "as the engine's, for this tier's pages",
        None,
        shown="the engine's",
    )
    fill: bool = option(
        parse_flag, "false: pages found here are not stored in the tiers before this one", True
    )
    load_only: bool = option(parse_flag, "true: no page is stored here", False)
    store_only: bool = option(parse_flag, "true: no page is looked for here", False)
    locality: str | None = option(
        or_none(partial(parse_choice, choices=LOCALITIES)),
        "`LOCAL` or `REMOTE`, for KV events and `kv_load_tiers`",
        None,
        shown="what the tier says",
    )
    backpressure: InitVar[Any] = option(
        _check_backpressure,
        "a slow tier is always held back, by its measured speed",
        None,
        idle=True,
    )
    tier_poll_interval_s: InitVar[Any] = option(
        _check_interval, "tiers work between steps without being polled", None, idle=True
    )

    def __post_init__(self, *_: object) -> None:
        if self.load_only and self.store_only:
            raise TierConfigError(
                "load_only and store_only: both are true, and the tier would do nothing; remove one"
            )
        if self.load_only and self.store_threshold:
            raise TierConfigError(
                f"store_threshold: {self.store_threshold} is given beside load_only, with which no "
                "page is stored here; remove one"
            )

    @property
    def is_required(self) -> bool:
        """Whether an engine does not start where the tier cannot be used."""
        if self.required is None:
            return (self.locality or tier_class(self.entry).locality) != "REMOTE"
        return self.required

    @property
    def directories(self) -> tuple[str, ...]:
        """Those below which the tier keeps files, as absolute paths."""
        return tier_class(self.entry).directories(tier_options(self.entry))


def tier_class(entry: Mapping[str, Any]) -> type[SecondaryTier]:
    """The class that an entry of `secondary_tiers` asks for.

    `type` is the class name where `module_path` is given; otherwise it is a built-in short
    name, the name of an entry point in the group `kvstrata.tiers`, or that of one of vLLM's own
    tiers. Of a class for vLLM's own manager, a `SecondaryTierManager`, comes one that works here.

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
    there = name.startswith(_THERE) and module in (None, STOCK_MODULE)
    if there and (own := stock_names().get(name)):
        raise TierConfigError(
            f"type: {name!r} is for vLLM's own {STOCK_SPEC}; here the type is {own!r}, without "
            "module_path"
        )
    if module is not None:
        if not isinstance(module, str) or not module:
            raise WrongValue("module_path", module, "an importable module")
        return _import(f"{module}:{name}", name)
    if name in BUILT_IN:
        return _import(BUILT_IN[name], name)
    for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        return _import(point.value, name)
    if name in STOCK:
        wrong = f"type {name!r}, a tier of vLLM's own, cannot be used: it"
        named = cast(Callable[[str], object], import_named(wrong, _STOCK_TIERS, "named"))
        return _tier(named(name), name, name)
    known = _known()
    word = re.sub("[^a-z0-9]", "", name.lower())
    called = [each for each, names in _CALLED.items() if names.fullmatch(word)]
    near = f" (did you mean {called[0]!r}?)" if called else nearest(name, known)
    raise TierConfigError(
        f"unknown type {name!r}{near}; known types: "
        f"{', '.join(known)}; for a class of your own give module_path as well"
    )


def tier_options(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry without the keys that every tier has: what the tier's class receives."""
    common = options_of(TierEntry)
    return {key: value for key, value in entry.items() if key not in common}


def tier_types() -> list[str]:
    """The short names of our tiers and of those of installed packages."""
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def stock_names() -> dict[str, str]:
    """The names of our tiers for vLLM's own spec, and our own: `KVStrataFs` and `fs`."""
    return {f"{_THERE}{_capitals(name)}": name for name in tier_types()}


def import_named(wrong: str, module: str, name: str) -> object:
    """What `module` calls `name`.

    Raises:
        TierConfigError: it cannot be imported, which begins with `wrong`.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # the module is foreign code and may raise anything
        raise TierConfigError(
            f"{wrong} cannot be imported from {module!r}: {type(error).__name__}: {error}; "
            "give a module and a class of it that the engine's processes can import"
        ) from error


def derives_from(found: object, base: tuple[str, str]) -> bool:
    """Whether it is a class with a base of this module and name, which may be of vLLM's own."""
    bases = found.__mro__ if isinstance(found, type) else ()
    return any((each.__module__, each.__name__) == base for each in bases)


def _known() -> list[str]:
    """The short names that `type` can be here; vLLM's own come last."""
    return list(dict.fromkeys((*tier_types(), *STOCK)))


def _capitals(name: str) -> str:
    return "".join(part.capitalize() for part in re.split("[^A-Za-z0-9]+", name))


def _import(target: str, name: str) -> type[SecondaryTier]:
    module, _, attribute = target.partition(":")
    return _tier(import_named(f"type {name!r}", module, attribute), target, name)


def _tier(found: object, target: str, name: str) -> type[SecondaryTier]:
    """The class that was found, or what makes it a tier of ours."""
    if derives_from(found, _STOCK_BASE):
        adapt = import_named(f"type {name!r}", _STOCK_TIERS, "adapted")
        found = cast(Callable[[object, str], object], adapt)(found, name)
    if not isinstance(found, type) or not issubclass(found, SecondaryTier):
        raise TierConfigError(
            f"{target!r} is not a subclass of kvstrata.tiers.base.SecondaryTier, nor of vLLM's "
            "SecondaryTierManager"
        )
    return found
