"""An entry of `secondary_tiers` for vLLM's own `TieringOffloadingSpec`, checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kvstrata.offload.config.offload_config import OffloadConfig, parse_tier
from kvstrata.tiers.options import ConfigError, options_of, read_options, same_option
from kvstrata.tiers.registry import STOCK_MODULE, STOCK_SPEC, TierEntry, stock_names

# What vLLM reads itself, and does not hand on.
_VLLMS = frozenset({"type", "module_path", "backpressure"})


@dataclass(frozen=True, slots=True)
class StockEntry:
    """What the entry says: its tier, and what `OffloadConfig` says of all."""

    tiers: tuple[TierEntry, ...]
    lookup_deadline_s: float = same_option(OffloadConfig, "lookup_deadline_s")
    promotion_deadline_s: float = same_option(OffloadConfig, "promotion_deadline_s")
    weights_fixed: bool | None = same_option(OffloadConfig, "weights_fixed")
    lora_paths_immutable: bool = same_option(OffloadConfig, "lora_paths_immutable")


def parse_stock_entry(name: str, given: Mapping[str, Any]) -> StockEntry:
    """Check an entry, with or without the keys that vLLM reads itself.

    Args:
        name: its `type`, one of `stock_names`.
        given: its keys.

    Raises:
        ConfigError: for the first thing that is wrong.
    """
    if "fill" in given:
        raise ConfigError(
            f'{name}: "fill" has no meaning here: vLLM\'s manager stores pages in all tiers when '
            "they are computed, and never later; remove it"
        )
    own = options_of(StockEntry)
    mine = {key: value for key, value in given.items() if key in own}
    tier = {key: value for key, value in given.items() if key not in own and key not in _VLLMS}
    tiers = (parse_tier(name, {"type": stock_names()[name], **tier}),)
    try:
        return StockEntry(tiers, **read_options(StockEntry, mine, name))
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def check_stock(extra: Mapping[str, Any]) -> None:
    """Check those entries of a `kv_connector_extra_config` of vLLM's spec that name our tiers.

    Raises:
        ConfigError: for the first thing that is wrong.
    """
    for entry in _ours(extra):
        check_name(entry.get("type"))
        parse_stock_entry(str(entry["type"]), entry)


def check_name(name: object) -> None:
    """Refuse what is none of our tiers.

    Raises:
        ConfigError: it names those that there are.
    """
    names = stock_names()
    if name not in names:
        raise ConfigError(
            f"type: {name!r} is none of kvstrata's tiers for vLLM's {STOCK_SPEC}; give one of "
            f"{', '.join(sorted(names))}"
        )


def _ours(extra: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if extra.get("spec_name") != STOCK_SPEC:
        return
    entries = extra.get("secondary_tiers")
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, Mapping) and entry.get("module_path") == STOCK_MODULE:
            yield entry
