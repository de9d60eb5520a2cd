"""Would a `kv_connector_extra_config` work here? Looked at without vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from kvstrata.offload.cli.doctor.machine import (
    OK,
    PROBLEM,
    WARNING,
    Check,
    check_memory,
    check_storage,
)
from kvstrata.offload.config.offload_config import OffloadConfig, parse_config
from kvstrata.offload.config.precheck import check_record, check_size
from kvstrata.offload.vllm_plugin.engine.early_check import SPEC_NAME
from kvstrata.offload.vllm_plugin.entry_point import SPEC_MODULE
from kvstrata.tiers.machine.memory import SHM
from kvstrata.tiers.options import ConfigError, format_bytes
from kvstrata.tiers.registry import TierEntry, tier_options

_INNER = "kv_connector_extra_config"
_CONNECTOR = "OffloadingConnector"


def examine_config(text: str) -> Iterator[Check]:
    """Look at the JSON of a `kv_connector_extra_config`, or of a `--kv-transfer-config` around it.

    Directories are looked at, and a block is written and removed where tiers would keep files, or
    at the nearest parent.
    """
    try:
        extra = _read(text)
        config = parse_config(extra)
    except ConfigError as error:
        yield Check("configuration", PROBLEM, "wrong", str(error))
        return
    yield Check("configuration", OK, f"{len(extra)} keys, {len(config.tiers)} secondary tiers")
    yield _check_spec(extra)
    for key, reason in config.without_effect.items():
        yield Check(key, WARNING, "does nothing here", reason)
    yield from _check_cpu_tier(config)
    if config.record is not None:
        yield _check_record(config.record)
    for tier in config.tiers:
        for path in tier.directories:
            yield Check(tier.name, OK, path)
            yield from check_storage(path)
        if tier.name == "pool" and "module_path" not in tier.entry:
            yield from _check_pool(tier, config.cpu_bytes)


def _read(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"this is no JSON: {error}") from None
    if isinstance(found, Mapping) and isinstance(found.get(_INNER), Mapping):
        found = _connector(found)[_INNER]
    if not isinstance(found, Mapping):
        raise ConfigError('this is no object: give {"cpu_bytes_to_use": "8GiB", ...}')
    return found


def _connector(transfer: Mapping[str, Any]) -> Mapping[str, Any]:
    """What makes our spec in a --kv-transfer-config: itself, or one of a MultiConnector's."""
    children = transfer[_INNER].get("connectors")
    if transfer.get("kv_connector") == "MultiConnector" and isinstance(children, list):
        for child in children:
            extra = child.get(_INNER) if isinstance(child, Mapping) else None
            if isinstance(extra, Mapping) and extra.get("spec_name") == SPEC_NAME:
                return _connector(child)
        raise ConfigError(f'no connector of the MultiConnector has "spec_name": "{SPEC_NAME}"')
    name = transfer.get("kv_connector")
    if name not in (None, _CONNECTOR):  # with --kv-offloading-size vLLM puts it in
        raise ConfigError(
            f"kv_connector: {name!r} does not use kvstrata: give {_CONNECTOR!r}, "
            f"with {_INNER} beside it"
        )
    return transfer


def _check_spec(extra: Mapping[str, Any]) -> Check:
    name = extra.get("spec_name")
    if name == SPEC_NAME:
        return Check("spec_name", OK, SPEC_NAME)
    found = "missing" if name is None else f"{name!r}"
    meaning = f'vLLM would not use kvstrata: give "spec_name": "{SPEC_NAME}"'
    if extra.get("spec_module_path") == SPEC_MODULE:
        return Check("spec_name", PROBLEM, found, f"{SPEC_MODULE} has only {SPEC_NAME}")
    return Check("spec_name", PROBLEM, found, meaning)


def _check_pool(tier: TierEntry, cpu_bytes: int) -> Iterator[Check]:
    from kvstrata.offload.cli.doctor.pool import check_pool

    try:
        given = check_pool(tier_options(tier.entry), cpu_bytes)
    except ConfigError as error:
        yield Check("pool memory", PROBLEM, "refused", str(error))
    else:
        meaning = "fits beside the CPU tier"
        yield Check("pool memory", OK, format_bytes(given.max_bytes), meaning)


def _check_record(path: str) -> Check:
    try:
        check_record(path)
    except ConfigError as error:
        return Check("record", PROBLEM, path, str(error))
    return Check("record", OK, path)


def _check_cpu_tier(config: OffloadConfig) -> Iterator[Check]:
    size = format_bytes(config.cpu_bytes)
    try:
        check_size(config.cpu_bytes)
    except ConfigError as error:
        yield Check("cpu_bytes_to_use", PROBLEM, size, str(error))
    else:
        yield Check("cpu_bytes_to_use", OK, size)
    yield from check_memory(SHM)
