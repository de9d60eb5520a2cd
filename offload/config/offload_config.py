"""`kv_connector_extra_config` -> a frozen `OffloadConfig`, or one clear error."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from kvstrata.offload.config.misplaced import elsewhere
from kvstrata.offload.primary.eviction.policies import named_policy
from kvstrata.tiers.base import LOCALITIES, TierConfigError
from kvstrata.tiers.options import UnknownKeyError, check_keys, nearest, parse_bytes, size_text
from kvstrata.tiers.registry import tier_class, tier_options

# Read by vLLM's connector rather than by us; listed so that they are not "unknown".
_VLLM_KEYS = (
    "spec_name",
    "spec_module_path",
    "block_size",
    "blocks_per_chunk",
    "offload_prompt_only",
    "self_describing_kv_events",
    "sync_load_budget_bytes",
)
# Of vLLM's own specs. They are taken, and do nothing here: an engine says so in one line.
_WITHOUT_EFFECT = ("canonical_layout", "backpressure", "tier_poll_interval_s")
_OWN_KEYS = (
    "cpu_bytes_to_use",
    "eviction_policy",
    "cache_policy_module_path",
    "store_threshold",
    "max_tracker_size",
    "secondary_tiers",
    "promotion_fraction",
    "pin_fraction",
    "load_or_recompute",
    "lookup_deadline_s",
    "promotion_deadline_s",
    "weights_fixed",
    "lora_paths_immutable",
    "transport",
    "audit_fraction",
)
_KEYS = (*_OWN_KEYS, *_VLLM_KEYS, *_WITHOUT_EFFECT)
TRANSPORTS = ("auto", "staged", "direct", "zero-copy")  # see kvstrata.kernels.gpu.transport

# The header of the region alone takes a mebibyte; x86 processors address 64 TiB.
_LEAST_CPU_BYTES, _MOST_CPU_BYTES = 2**20, 2**46
# A prompt is stored in whole chunks, so a chunk longer than any prompt stores nothing.
_MOST_BLOCKS, _MOST_TOKENS = 2**16, 2**20
_MOST_OFFERS = 1000
_MOST_TRACKED = 10**9


class ConfigError(ValueError):
    """A configuration value is wrong: the message names key, value and remedy."""


@dataclass(frozen=True, slots=True)
class TierEntry:
    """One element of `secondary_tiers`, checked. `entry` is as the user wrote it.

    `store_threshold` and `max_tracker_size` mean for this tier what they mean for the engine.
    `kv_events`: whether KV events of this tier's pages are published, where events are on.
    `locality`: "LOCAL" or "REMOTE", for KV events and `kv_load_tiers`; None: what the tier says.
    """

    name: str
    entry: Mapping[str, Any]
    store_threshold: int = 0
    max_tracker_size: int = 64_000
    kv_events: bool = True
    locality: str | None = None


@dataclass(frozen=True, slots=True)
class OffloadConfig:
    """The engine's configuration. Bytes in bytes, times in seconds.

    Attributes:
        cpu_bytes: size of the primary tier, all workers together.
        eviction_policy: "auto", "lru", "arc", or "package.module:Class" (see eviction.py).
        store_threshold: store a chunk from this many offers on; 0 and 1 store at once.
        max_tracker_size: how many keys the counting for `store_threshold` remembers.
        tiers: secondary tiers in the order of look-up.
        promotion_fraction: largest share of the primary tier held by running promotions.
        pin_fraction: largest share of the primary tier held by requests' `pin_seconds`; 0: none.
        load_or_recompute: compute a prefix where loading it is expected to take longer.
        lookup_deadline_s: a tier that has not answered a look-up by then is a miss.
        promotion_deadline_s: a promotion that has not arrived by then is a miss.
        weights_fixed: None: decided from the engine's configuration.
        lora_paths_immutable: the user's word that an adapter's path never changes content.
        transport: how pages go between a GPU and the primary tier; "auto" tries at start.
        audit_fraction: of the pages that requests load, those to compute again and compare; 0
            turns audits off.
        without_effect: keys of vLLM's own specs that were given and do nothing here, each with
            the reason.
    """

    cpu_bytes: int
    eviction_policy: str = "auto"
    store_threshold: int = 0
    max_tracker_size: int = 64_000
    tiers: tuple[TierEntry, ...] = field(default_factory=tuple)
    promotion_fraction: float = 0.5
    pin_fraction: float = 0.25
    load_or_recompute: bool = False
    lookup_deadline_s: float = 1.0
    promotion_deadline_s: float = 10.0
    weights_fixed: bool | None = None
    lora_paths_immutable: bool = False
    transport: str = "auto"
    audit_fraction: float = 0.001
    without_effect: Mapping[str, str] = field(default_factory=dict)


def parse_config(extra: Mapping[str, Any]) -> OffloadConfig:
    """Check `kv_connector_extra_config` and freeze it.

    Raises:
        ConfigError: for the first thing that is wrong.
    """
    try:
        return _parse(extra)
    except UnknownKeyError as error:
        raise ConfigError(_placed(error, in_tier=False)) from None
    except TierConfigError as error:
        raise ConfigError(str(error)) from None


def _parse(extra: Mapping[str, Any]) -> OffloadConfig:
    check_keys("kv_connector_extra_config", extra, _KEYS)
    if extra.get("cpu_bytes_to_use") is None:
        raise ConfigError(
            'cpu_bytes_to_use is missing: give the size of the CPU tier, for example "8GiB"'
        )
    if extra.get("block_size") is not None and extra.get("blocks_per_chunk") is not None:
        raise ConfigError(
            f"block_size={extra['block_size']!r} and blocks_per_chunk="
            f"{extra['blocks_per_chunk']!r} are both given: remove one of them"
        )
    # vLLM converts these without looking: "false" becomes true and 2.7 becomes 2.
    for key, most in (("block_size", _MOST_TOKENS), ("blocks_per_chunk", _MOST_BLOCKS)):
        if extra.get(key) is not None:
            _integer(extra, key, 1, least=1, most=most)
    _check_sync_budget(extra.get("sync_load_budget_bytes", 0))
    for key in ("offload_prompt_only", "self_describing_kv_events"):
        _flag(extra, key)
    transport = extra.get("transport", "auto")
    if transport not in TRANSPORTS:
        near = nearest(transport, TRANSPORTS) if isinstance(transport, str) else ""
        raise ConfigError(f"transport={transport!r}: use one of {', '.join(TRANSPORTS)}{near}")
    weights_fixed = extra.get("weights_fixed")
    without_effect = _without_effect(extra)
    try:
        policy, passed_over = named_policy(
            extra.get("eviction_policy", "auto"), extra.get("cache_policy_module_path")
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if passed_over:
        without_effect["eviction_policy"] = passed_over
    tiers = _parse_tiers(extra.get("secondary_tiers", []))
    for index, tier in enumerate(tiers):
        for key, reason in _without_effect(tier.entry).items():
            without_effect[f"secondary_tiers[{index}].{key}"] = reason
    return OffloadConfig(
        cpu_bytes=_cpu_bytes(extra["cpu_bytes_to_use"]),
        eviction_policy=policy,
        store_threshold=_integer(extra, "store_threshold", 0, least=0, most=_MOST_OFFERS),
        max_tracker_size=_integer(extra, "max_tracker_size", 64_000, least=1, most=_MOST_TRACKED),
        tiers=tiers,
        promotion_fraction=_number(extra, "promotion_fraction", 0.5, most=1.0),
        pin_fraction=_number(extra, "pin_fraction", 0.25, most=1.0, zero=True),
        load_or_recompute=_flag(extra, "load_or_recompute"),
        lookup_deadline_s=_number(extra, "lookup_deadline_s", 1.0, most=3600.0),
        promotion_deadline_s=_number(extra, "promotion_deadline_s", 10.0, most=3600.0),
        weights_fixed=None if weights_fixed is None else _flag(extra, "weights_fixed"),
        lora_paths_immutable=_flag(extra, "lora_paths_immutable"),
        transport=transport,
        audit_fraction=_number(extra, "audit_fraction", 0.001, most=1.0, zero=True),
        without_effect=without_effect,
    )


def _placed(error: UnknownKeyError, *, in_tier: bool) -> str:
    """The error's text, or where the key belongs if it belongs elsewhere."""
    place = elsewhere(error.key, in_tier=in_tier, engine_keys=_KEYS)
    return f"{error.where}: unknown key {error.key!r}: {place}" if place else str(error)


def _cpu_bytes(value: object) -> int:
    size = parse_bytes("cpu_bytes_to_use", value)
    if size < _LEAST_CPU_BYTES:
        raise ConfigError(
            f"cpu_bytes_to_use: {value!r} is {size_text(size)}, less than one page takes; give "
            'bytes, or a unit with them, for example "8GiB"'
        )
    if size > _MOST_CPU_BYTES:
        raise ConfigError(
            f"cpu_bytes_to_use: {value!r} is more memory than a machine has; give what this one "
            'can spare, for example "8GiB"'
        )
    return size


def _check_sync_budget(value: object) -> None:
    """vLLM's connector reads it, with `int()`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**60:
        remedy = "use a number of bytes of at least 0"
        with suppress(TierConfigError):  # vLLM takes no units
            if isinstance(value, str):
                remedy = f"use the number of bytes, {parse_bytes('', value)}"
        raise ConfigError(f"sync_load_budget_bytes={value!r}: {remedy}")


def _without_effect(options: Mapping[str, Any]) -> dict[str, str]:
    """The keys that are for vLLM's own specs only, checked, and why they do nothing here.

    Raises:
        ConfigError: one of them is not what those specs take.
    """
    reasons: dict[str, str] = {}
    if "canonical_layout" in options:
        if options["canonical_layout"] is not True:
            raise ConfigError(
                f"canonical_layout={options['canonical_layout']!r}: pages are always canonical "
                "here; remove the key"
            )
        reasons["canonical_layout"] = "pages are always canonical"
    if "backpressure" in options:
        value = options["backpressure"]
        if value is not None and not isinstance(value, Mapping):
            raise ConfigError(f"backpressure={value!r}: use an object, or remove the key")
        reasons["backpressure"] = "a slow tier is always held back, by its measured speed"
    if "tier_poll_interval_s" in options:
        value = options["tier_poll_interval_s"]
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 3600:
            raise ConfigError(f"tier_poll_interval_s={value!r}: use a number, or remove the key")
        reasons["tier_poll_interval_s"] = "tiers work between steps without being polled"
    return reasons


def _parse_tiers(value: Any) -> tuple[TierEntry, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(
            f"secondary_tiers={value!r}: use a list such as "
            '[{"type": "fs", "root_dir": "/mnt/kv"}]'
        )
    tiers: list[TierEntry] = []
    for index, entry in enumerate(value):
        if not isinstance(entry, Mapping):
            raise ConfigError(
                f'secondary_tiers[{index}]={entry!r}: use an object such as {{"type": "fs", ...}}'
            )
        try:
            tier = _parse_tier(entry, tiers)
        except UnknownKeyError as error:
            text = _placed(error, in_tier=True)
            raise ConfigError(f"secondary_tiers[{index}]: {text}") from None
        except (TierConfigError, ConfigError) as error:
            raise ConfigError(f"secondary_tiers[{index}]: {error}") from None
        tiers.append(tier)
    return tuple(tiers)


def _parse_tier(entry: Mapping[str, Any], before: list[TierEntry]) -> TierEntry:
    cls, options = tier_class(entry), tier_options(entry)
    cls.check_options(options)
    locality = entry.get("locality")
    if locality is not None and locality not in LOCALITIES:
        near = nearest(locality, LOCALITIES) if isinstance(locality, str) else ""
        raise ConfigError(f"locality={locality!r}: use {' or '.join(LOCALITIES)}{near}")
    if "canonical_layout" in entry:
        raise ConfigError("canonical_layout is a key of kv_connector_extra_config; remove it here")
    _without_effect(entry)
    _check_apart(entry, before)
    type_name = str(entry["type"])
    others = sum(1 for tier in before if tier.entry["type"] == type_name)
    return TierEntry(
        name=f"{type_name}-{others + 1}" if others else type_name,
        entry=dict(entry),
        store_threshold=_integer(entry, "store_threshold", 0, least=0, most=_MOST_OFFERS),
        max_tracker_size=_integer(entry, "max_tracker_size", 64_000, least=1, most=_MOST_TRACKED),
        kv_events=_flag(entry, "enable_kv_events", default=True),
        locality=locality,
    )


def _check_apart(entry: Mapping[str, Any], before: list[TierEntry]) -> None:
    """Refuse a tier that would keep the same pages in the same place as one before it."""
    same = _same(entry)
    mine = tier_class(entry).directories(tier_options(entry))
    for tier in before:
        theirs = tier_class(tier.entry).directories(tier_options(tier.entry))
        for here in mine:
            for there in theirs:
                if here != there and os.path.commonpath((here, there)) in (here, there):
                    raise ConfigError(
                        f"{here!r} and {there!r} of tier {tier.name} lie one in the other: each "
                        "would count and evict the other's files; give directories that do not"
                    )
        if _same(tier.entry) == same or set(mine) & set(theirs):
            raise ConfigError(
                f"{dict(entry)!r} is listed twice: every page would be stored twice; remove one"
            )


def _same(entry: Mapping[str, Any]) -> object:
    """Equal for two tiers that keep the same pages in the same place."""
    options = {key: _normal(value) for key, value in tier_options(entry).items()}
    return tier_class(entry), options


def _normal(value: Any) -> Any:
    """The option with paths written in one way."""
    if isinstance(value, list | tuple):
        return [_normal(each) for each in value]
    if isinstance(value, str) and value.startswith(("/", "~")):
        return os.path.normpath(os.path.expanduser(value))
    return value


def _flag(extra: Mapping[str, Any], key: str, *, default: bool = False) -> bool:
    value = extra.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{key}={value!r}: use true or false{_unquoted(value)}")
    return value


def _integer(extra: Mapping[Any, Any], key: str, default: int, *, least: int, most: int) -> int:
    value = extra.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        text = f"{key}={value!r}: use a whole number from {least} to {most:,}"
        raise ConfigError(text + _unquoted(value))
    return value


def _number(
    extra: Mapping[str, Any], key: str, default: float, *, most: float, zero: bool = False
) -> float:
    """A finite number above 0, or from 0 on where `zero` is allowed, and at most `most`."""
    value = extra.get(key, default)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 <= value <= most  # NaN is not either
        or (value == 0 and not zero)
    ):
        bounds = f"from 0 to {most:g}" if zero else f"above 0 and at most {most:g}"
        raise ConfigError(f"{key}={value!r}: use a number {bounds}{_unquoted(value)}")
    return float(value)


def _unquoted(value: object) -> str:
    """What to say of a number, or true or false, that was written as a string."""
    plain = isinstance(value, str) and re.fullmatch(r"true|false|-?[0-9]+(\.[0-9]+)?", value)
    return ", without quotes" if plain else ""
