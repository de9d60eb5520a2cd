"""Would this tier work? It is opened, and probe pages are stored, found, loaded and deleted."""

from __future__ import annotations

import json
from collections.abc import Iterator

from kvstrata.offload.cli.copy.ending import ended_gently
from kvstrata.offload.cli.copy.place import PlaceError
from kvstrata.offload.cli.doctor.ground import ground_of
from kvstrata.offload.cli.doctor.machine import OK, PROBLEM, WARNING, Check, check_storage
from kvstrata.offload.cli.doctor.probe import Probe, probe_context
from kvstrata.offload.config.offload_config import parse_config
from kvstrata.tiers.options import ConfigError
from kvstrata.tiers.registry import TierEntry, tier_class


def examine_tier(text: str) -> Iterator[Check]:
    """Open the tier that an entry of `secondary_tiers`, as JSON, asks for, and try it.

    The pages are of a namespace that no engine has, and lie apart from all others.
    """
    try:
        entry = _read(text)
    except ConfigError as error:
        yield Check("options", PROBLEM, "wrong", str(error))
        return
    yield Check("options", OK, f"type {entry.name}")
    for path in entry.directories:
        for check in check_storage(path):
            yield check
            if check.status == PROBLEM:
                return
    if entry.name == "pool":
        yield _check_memory()
    context, step, sound = probe_context(), "connect", True
    try:
        with ended_gently(), ground_of(entry.entry, context) as ground:
            cls = tier_class(entry.entry)
            for check in Probe(cls, ground, context).checks():
                yield check
                sound = check.status != PROBLEM
            step = "delete"
    except (ConfigError, PlaceError, OSError) as error:
        yield Check(step, PROBLEM, "failed", str(error))
        return
    if ground.removed and sound:
        yield Check("delete", OK, "nothing is left")


def _check_memory() -> Check:
    """Whether pools are as fast here as they can be."""
    from kvstrata.tiers.pool.place import slow_memory

    if advice := slow_memory():
        return Check("memory", WARNING, "small pages", advice)
    return Check("memory", OK, "huge pages")


def _read(text: str) -> TierEntry:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"this is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError('this is no object: give {"type": "fs", ...}, as in secondary_tiers')
    # the size of the CPU tier is of no account
    return parse_config({"cpu_bytes_to_use": "1GiB", "secondary_tiers": [found]}).tiers[0]
