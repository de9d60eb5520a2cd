"""What FROM and TO name: a directory, a url, or a tier as in `secondary_tiers`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from kvstrata.offload.cli.copy.place import Place
from kvstrata.tiers.base import TierConfigError
from kvstrata.tiers.options import parse_options
from kvstrata.tiers.registry import tier_options

_SERVERS = ("valkey", "valkeys", "redis", "rediss")
_EXAMPLE = (
    'a directory, "s3://bucket/prefix", "valkey://host:6379", or a tier as in secondary_tiers'
)


def open_place(what: str, text: str) -> Place:
    """The place that `text` names; `what` is the argument it was given as.

    A directory need not exist, and nothing is made.

    Raises:
        TierConfigError: it names none; or one of the options is wrong.
        PlaceError: it cannot be reached.
    """
    entry = _entry(what, text)
    kind, options = entry.get("type"), tier_options(entry)
    if kind == "pool":
        from kvstrata.offload.cli.copy.pool import PoolPlace
        from kvstrata.tiers.pool.config import PoolOptions

        given = parse_options(PoolOptions, options, "pool tier")
        return PoolPlace(given.name, given.files)
    if kind == "fs":
        from kvstrata.offload.cli.copy.directory import DirectoryPlace
        from kvstrata.offload.cli.copy.pool import PoolPlace
        from kvstrata.tiers.fs.config import FsConfig
        from kvstrata.tiers.pool.place import name_of

        configs = FsConfig.parse(options)
        if len(configs) > 1:
            raise TierConfigError(f"{what}: root_dir has several directories: give one")
        if name := name_of(os.path.realpath(configs[0].root_dir)):
            return PoolPlace(name, configs[0])
        return DirectoryPlace(configs[0].root_dir, configs[0])
    if kind == "object":
        from kvstrata.tiers.object.config import ObjectConfig

        config = ObjectConfig.parse(options)
        from kvstrata.offload.cli.copy.bucket import BucketPlace

        return BucketPlace(config)
    if kind == "valkey":
        from kvstrata.tiers.valkey.tier import parse

        parsed = parse(options)
        from kvstrata.offload.cli.copy.server import ServerPlace

        return ServerPlace(parsed)
    raise TierConfigError(f"{what}: pages of type {kind!r} cannot be copied; give {_EXAMPLE}")


def _entry(what: str, text: str) -> Mapping[str, Any]:
    if text.startswith("{"):
        try:
            found = json.loads(text)
        except ValueError as error:
            raise TierConfigError(f"{what}: this is no JSON: {error}; give {_EXAMPLE}") from None
        return dict(found)
    scheme, colon, _ = text.partition("://")
    if colon:
        return {"type": "valkey" if scheme in _SERVERS else "object", "url": text}
    elsewhere = text.startswith("~") or ":/" in text  # the tier knows what to say
    return {"type": "fs", "root_dir": text if elsewhere else os.path.abspath(text)}
