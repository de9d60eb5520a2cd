"""`kv_connector_extra_config` -> a frozen `OffloadConfig`, or one clear error."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvstrata.offload.policies import policy_class
from kvstrata.tiers.base import TierConfigError
from kvstrata.tiers.options import check_keys, parse_bytes
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
_OWN_KEYS = (
    "cpu_bytes_to_use",
    "eviction_policy",
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
TRANSPORTS = ("auto", "staged", "direct", "zero-copy")  # see kvstrata.kernels.transport


class ConfigError(ValueError):
    """A configuration value is wrong: the message names key, value and remedy."""


@dataclass(frozen=True, slots=True)
class TierEntry:
    """One element of `secondary_tiers`, checked. `entry` is as the user wrote it.

    `store_threshold` and `max_tracker_size` mean for this tier what they mean for the engine.
    """

    name: str
    entry: Mapping[str, Any]
    store_threshold: int = 0
    max_tracker_size: int = 64_000


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


def parse_config(extra: Mapping[str, Any]) -> OffloadConfig:
    """Check `kv_connector_extra_config` and freeze it.

    Raises:
        ConfigError: for the first thing that is wrong.
    """
    try:
        return _parse(extra)
    except TierConfigError as error:
        raise ConfigError(str(error)) from None


def _parse(extra: Mapping[str, Any]) -> OffloadConfig:
    if "canonical_layout" in extra:
        raise ConfigError(
            f"canonical_layout={extra['canonical_layout']!r}: pages are always canonical here; "
            "remove the key"
        )
    check_keys("kv_connector_extra_config", extra, _OWN_KEYS + _VLLM_KEYS)
    if "cpu_bytes_to_use" not in extra:
        raise ConfigError(
            'cpu_bytes_to_use is missing: give the size of the CPU tier, for example "8GiB"'
        )
    if extra.get("block_size") is not None and extra.get("blocks_per_chunk") is not None:
        raise ConfigError(
            f"block_size={extra['block_size']!r} and blocks_per_chunk="
            f"{extra['blocks_per_chunk']!r} are both given: remove one of them"
        )
    # vLLM converts these without looking: "false" becomes true and 2.7 becomes 2.
    for key in ("block_size", "blocks_per_chunk"):
        if extra.get(key) is not None:
            _integer(extra, key, 1, least=1)
    _integer(extra, "sync_load_budget_bytes", 0, least=0)
    for key in ("offload_prompt_only", "self_describing_kv_events"):
        _flag(extra, key)
    policy = extra.get("eviction_policy", "auto")
    try:
        policy_class(policy)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    transport = extra.get("transport", "auto")
    if transport not in TRANSPORTS:
        raise ConfigError(f"transport={transport!r}: use one of {', '.join(TRANSPORTS)}")
    weights_fixed = extra.get("weights_fixed")
    return OffloadConfig(
        cpu_bytes=parse_bytes("cpu_bytes_to_use", extra["cpu_bytes_to_use"]),
        eviction_policy=policy,
        store_threshold=_integer(extra, "store_threshold", 0, least=0),
        max_tracker_size=_integer(extra, "max_tracker_size", 64_000, least=1),
        tiers=_parse_tiers(extra.get("secondary_tiers", [])),
        promotion_fraction=_number(extra, "promotion_fraction", 0.5, most=1.0),
        pin_fraction=_number(extra, "pin_fraction", 0.25, most=1.0, zero=True),
        load_or_recompute=_flag(extra, "load_or_recompute"),
        lookup_deadline_s=_number(extra, "lookup_deadline_s", 1.0, most=3600.0),
        promotion_deadline_s=_number(extra, "promotion_deadline_s", 10.0, most=3600.0),
        weights_fixed=None if weights_fixed is None else _flag(extra, "weights_fixed"),
        lora_paths_immutable=_flag(extra, "lora_paths_immutable"),
        transport=transport,
        audit_fraction=_number(extra, "audit_fraction", 0.001, most=1.0, zero=True),
    )


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
            tier_class(entry).check_options(tier_options(entry))
            threshold = _integer(entry, "store_threshold", 0, least=0)
            tracked = _integer(entry, "max_tracker_size", 64_000, least=1)
        except (TierConfigError, ConfigError) as error:
            raise ConfigError(f"secondary_tiers[{index}]: {error}") from None
        same = _same(entry)
        if any(_same(tier.entry) == same for tier in tiers):
            raise ConfigError(
                f"secondary_tiers[{index}]={dict(entry)!r} is listed twice: every page would be "
                "stored twice; remove one"
            )
        type_name = str(entry["type"])
        others = sum(1 for tier in tiers if tier.entry["type"] == type_name)
        name = f"{type_name}-{others + 1}" if others else type_name
        tiers.append(TierEntry(name, dict(entry), threshold, tracked))
    return tuple(tiers)


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


def _flag(extra: Mapping[str, Any], key: str) -> bool:
    value = extra.get(key, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{key}={value!r}: use true or false")
    return value


def _integer(extra: Mapping[Any, Any], key: str, default: int, *, least: int) -> int:
    value = extra.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{key}={value!r}: use a whole number of at least {least}")
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
        raise ConfigError(f"{key}={value!r}: use a number {bounds}")
    return float(value)
