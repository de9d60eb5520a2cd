"""`kv_connector_extra_config` -> a frozen `OffloadConfig`, or one clear error."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import InitVar, dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

from kvstrata.offload.config.misplaced import elsewhere
from kvstrata.offload.primary.eviction.policies import named_policy
from kvstrata.tiers.options import (
    ConfigError,
    UnknownKeyError,
    WrongValue,
    format_bytes,
    option,
    options_of,
    or_none,
    parse_any,
    parse_bytes,
    parse_choice,
    parse_count,
    parse_flag,
    parse_number,
    read_options,
    same_option,
)
from kvstrata.tiers.registry import TierEntry, tier_class, tier_options

TRANSPORTS = ("auto", "staged", "direct", "zero-copy")  # see kvstrata.kernels.gpu.transport

# The header of the region alone takes a mebibyte; x86 processors address 64 TiB.
_LEAST_CPU_BYTES, _MOST_CPU_BYTES = 2**20, 2**46
# A prompt is stored in whole chunks, so a chunk longer than any prompt stores nothing.
_MOST_BLOCKS, _MOST_TOKENS = 2**16, 2**20
_FRACTION = partial(parse_number, most=1.0)
_ZERO_TO_ONE = partial(parse_number, most=1.0, zero=True)
_SECONDS = partial(parse_number, most=3600.0)


def _cpu_bytes(key: str, value: object) -> int:
    size = parse_bytes(key, value)
    if _LEAST_CPU_BYTES <= size <= _MOST_CPU_BYTES:
        return size
    less = f"is {format_bytes(size)}, less than one page takes"
    raise ConfigError(
        f"{key}: {value!r} {less if size < _LEAST_CPU_BYTES else 'is more than a machine has'}; "
        'give the memory that this one can spare, with a unit, for example "8GiB"'
    )


def _check_sync_budget(key: str, value: object) -> None:
    """vLLM's connector reads it, with `int()`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**60:
        remedy = "a number of bytes of at least 0"
        with suppress(ConfigError):  # vLLM takes no units
            if isinstance(value, str):
                remedy = f"the number of bytes, {parse_bytes('', value)}"
        raise WrongValue(key, value, remedy)


def _check_canonical(key: str, value: object) -> None:
    if value is not True:
        raise WrongValue(key, value, "true, or remove the key: pages are always canonical here")


def _record_path(key: str, value: object) -> str:
    path = os.path.expanduser(value) if isinstance(value, str) else ""
    # processes of the engine need not share a working directory
    if not os.path.isabs(path) or path.endswith("/") or "\0" in path:
        remedy = 'the absolute path of a file, for example "/var/log/kvstrata/requests.jsonl"'
        raise WrongValue(key, value, remedy)
    return path


def _parse_tiers(key: str, value: Any) -> tuple[TierEntry, ...]:
    if not isinstance(value, list | tuple):
        raise WrongValue(key, value, 'a list such as [{"type": "fs", "root_dir": "/mnt/kv"}]')
    tiers: list[TierEntry] = []
    for index, entry in enumerate(value):
        tiers.append(parse_tier(f"{key}[{index}]", entry, tiers))
    return tuple(tiers)


@dataclass(frozen=True, slots=True)
class OffloadConfig:
    """The engine's configuration: bytes in bytes, times in seconds. Its options are the keys of
    `kv_connector_extra_config`. Those that vLLM reads itself are only checked, since it converts
    without looking: "false" becomes true and 2.7 becomes 2.

    Attributes:
        eviction_policy: as `policy_class` takes it.
        tiers: secondary tiers in the order of look-up.
        weights_fixed: None: decided from the engine's configuration.
        without_effect: keys of vLLM's own specs that were given and do nothing here, each with
            the reason.
        record: path of a recording of the requests; None: there is none.
    """

    spec_name: InitVar[Any] = option(parse_any, "`KVStrataSpec`", None, shown="required")
    spec_module_path: InitVar[Any] = option(
        parse_any,
        "`kvstrata.offload.vllm_plugin.spec`; only where `VLLM_PLUGINS` disables plugins",
        None,
    )
    cpu_bytes: int = option(
        _cpu_bytes,
        'the size of the CPU tier, all workers together: bytes, or `"8GiB"`; its memory is '
        "reserved while the engine [starts and serves](architecture.md#memory-while-serving)",
        key="cpu_bytes_to_use",
        other_names="num_cpu_blocks cpu_bytes_to_use_per_rank cpu_bytes_per_rank swap_space "
        "kv_offloading_size cpu_swap_space_gb max_local_cpu_size",
    )
    block_size: InitVar[Any] = option(
        or_none(partial(parse_count, most=_MOST_TOKENS)),
        "the chunk's size in tokens, a multiple of the GPU block; not beside `blocks_per_chunk`",
        None,
        shown="GPU block size",
    )
    blocks_per_chunk: InitVar[Any] = option(
        or_none(partial(parse_count, most=_MOST_BLOCKS)),
        "the chunk's size in blocks; for very long prompts use 8 to 32 "
        "([manager.md](manager.md#what-is-awaited-and-how-long))",
        None,
        shown="`1`",
    )
    eviction_policy: str = option(
        parse_any,
        "`auto` ([no cliff, resists scans](manager.md#what-is-kept-in-cpu-memory)), `lru`, `arc`, "
        "or `package.module:Class`, a subclass of "
        "`kvstrata.offload.primary.eviction.policy.EvictionPolicy`",
        "auto",
    )
    cache_policy_module_path: InitVar[Any] = option(
        parse_any, "the module of a class in `eviction_policy` ([stock.md](stock.md))", None
    )
    store_threshold: int = same_option(TierEntry, "store_threshold")
    max_tracker_size: int = same_option(TierEntry, "max_tracker_size")
    offload_prompt_only: InitVar[Any] = option(
        parse_flag, "false: generated tokens are stored as well", True
    )
    self_describing_kv_events: InitVar[Any] = option(parse_flag, "as in vLLM", False)
    sync_load_budget_bytes: InitVar[Any] = option(
        _check_sync_budget,
        "vLLM 0.33's own key: bytes per step that may be loaded inside the step",
        0,
    )
    tiers: tuple[TierEntry, ...] = option(
        _parse_tiers,
        'ordered list of `{"type": ..., ...}`',
        (),
        key="secondary_tiers",
        other_names="tiers",
    )
    promotion_fraction: float = option(
        _FRACTION,
        "largest share of the CPU tier taken by pages on their way in from secondary tiers",
        0.5,
    )
    pin_fraction: float = option(
        _ZERO_TO_ONE, "largest share of the CPU tier kept by requests' `pin_seconds`; 0: none", 0.25
    )
    load_or_recompute: bool = option(
        parse_flag,
        "true: a prefix that takes longer to load from a secondary tier than to compute is "
        "computed ([manager.md](manager.md))",
        False,
    )
    lookup_deadline_s: float = option(
        _SECONDS, "a tier that has not answered a look-up by then counts as a miss", 1.0
    )
    promotion_deadline_s: float = option(
        _SECONDS,
        "so long a request waits for pages, of tiers and of the GPU; what has not arrived by then "
        "counts as a miss ([manager.md](manager.md#what-is-awaited-and-how-long))",
        10.0,
    )
    weights_fixed: bool | None = option(
        or_none(parse_flag),
        "false: every cache reset makes all earlier files unreachable, and files are private to "
        "the process; the `fs` tier then needs one of its limits ([weights.md](weights.md))",
        None,
        shown="true; false with `weight_transfer_config`; must be given with sleep mode, a worker "
        "extension or an executor of your own",
    )
    lora_paths_immutable: bool = option(
        parse_flag,
        "true: your word that a LoRA path never changes content; without it LoRA turns secondary "
        "tiers off",
        False,
    )
    transport: str = option(
        partial(parse_choice, choices=TRANSPORTS),
        "how pages go between a GPU and the CPU tier: `staged`, `direct`, `zero-copy`, or what is "
        "fastest in a trial at start ([transfers.md](transfers.md))",
        "auto",
    )
    audit_fraction: float = option(
        _ZERO_TO_ONE,
        "of the pages that requests load, how many are computed again and compared with what was "
        "stored ([audit.md](audit.md)); 0: none",
        0.001,
    )
    log_interval_s: float = option(
        partial(parse_number, most=86_400.0, zero=True),
        "while there is traffic a line of the log says so often what was found, saved and held; "
        "0: never",
        60.0,
    )
    record: str | None = option(
        or_none(_record_path),
        "a new file with hashes, lengths and times of all requests, for `kvstrata simulate` "
        "([simulate.md](simulate.md#a-recording-of-your-own-server))",
        None,
    )
    canonical_layout: InitVar[Any] = option(
        _check_canonical, "pages are always canonical", True, idle=True
    )
    backpressure: InitVar[Any] = same_option(TierEntry, "backpressure")
    tier_poll_interval_s: InitVar[Any] = same_option(TierEntry, "tier_poll_interval_s")
    without_effect: Mapping[str, str] = field(default_factory=dict)


def parse_config(extra: Mapping[str, Any]) -> OffloadConfig:
    """Check `kv_connector_extra_config` and freeze it.

    Raises:
        ConfigError: for the first thing that is wrong.
    """
    try:
        values = read_options(OffloadConfig, extra, "kv_connector_extra_config")
    except UnknownKeyError as error:
        raise ConfigError(_placed(error, in_tier=False)) from None
    if extra.get("block_size") is not None and extra.get("blocks_per_chunk") is not None:
        raise ConfigError(
            f"block_size: {extra['block_size']!r} and blocks_per_chunk: "
            f"{extra['blocks_per_chunk']!r} are both given; remove one of them"
        )
    without_effect = _idle(OffloadConfig, extra)
    for index, tier in enumerate(values.get("tiers", ())):
        for key, reason in _idle(TierEntry, tier.entry).items():
            without_effect[f"secondary_tiers[{index}].{key}"] = reason
    values["eviction_policy"], passed_over = named_policy(
        extra.get("eviction_policy", "auto"), extra.get("cache_policy_module_path")
    )
    if passed_over:
        without_effect["eviction_policy"] = passed_over
    return OffloadConfig(**values, without_effect=without_effect)


def _idle(cls: type, given: Mapping[str, Any]) -> dict[str, str]:
    """The keys that are for vLLM's own specs only, and why they do nothing here."""
    return {key: each.help for key, each in options_of(cls).items() if each.idle and key in given}


def _placed(error: UnknownKeyError, *, in_tier: bool) -> str:
    """The error's text, with where the key belongs if it belongs elsewhere."""
    if error.instead:
        return str(error)
    place = elsewhere(error.key, options_of(OffloadConfig), in_tier=in_tier)
    known = {*error.known, *(options_of(TierEntry) if in_tier else ())}
    return str(UnknownKeyError(error.where, error.key, known, place))


def parse_tier(where: str, entry: Any, before: Sequence[TierEntry] = ()) -> TierEntry:
    """Check an entry of `secondary_tiers`.

    Args:
        where: it stands, for errors.
        entry: as the user wrote it.
        before: those that stand before it.

    Raises:
        ConfigError: for the first thing that is wrong.
    """
    if not isinstance(entry, Mapping):
        raise WrongValue(where, entry, 'an object such as {"type": "fs", ...}')
    try:
        return _parse_tier(entry, before)
    except UnknownKeyError as error:
        raise ConfigError(f"{where}: {_placed(error, in_tier=True)}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _parse_tier(entry: Mapping[str, Any], before: Sequence[TierEntry]) -> TierEntry:
    cls = tier_class(entry)
    cls.check_options(tier_options(entry))
    common = options_of(TierEntry)
    shared = {key: value for key, value in entry.items() if key in common}
    given = read_options(TierEntry, shared, "secondary_tiers")
    type_name = str(entry["type"])
    others = sum(1 for tier in before if tier.entry["type"] == type_name)
    tier = TierEntry(f"{type_name}-{others + 1}" if others else type_name, dict(entry), **given)
    _check_apart(tier, before)
    return tier


def _check_apart(tier: TierEntry, before: Sequence[TierEntry]) -> None:
    """Refuse a tier that would keep pages where it, or one before it, keeps others."""
    if any(_options(tier) == _options(other) for other in before):
        raise ConfigError(
            f"{tier.entry!r} is listed twice: every page would be stored twice; remove one"
        )
    paths = [path for each in (*before, tier) for path in each.directories]
    for one, other in combinations(paths, 2):
        here, there = os.path.realpath(one), os.path.realpath(other)
        if os.path.commonpath((here, there)) in (here, there):
            raise ConfigError(
                f"{one!r} and {other!r} lead to one directory, or one into the other: each would "
                "count and evict the other's files; give directories that do not, or remove one"
            )


def _options(tier: TierEntry) -> tuple[type, Mapping[str, Any]]:
    """Equal for two tiers that keep the same pages in the same way."""
    return tier_class(tier.entry), tier_options(tier.entry)
