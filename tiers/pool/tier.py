"""The pool tier: pages of a node in shared memory, for all servers of a user, and the next ones."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from kvstrata.tiers.base import TierConfigError, TierContext
from kvstrata.tiers.fs.config import FsConfig
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.options import parse_options
from kvstrata.tiers.pool.config import PoolOptions
from kvstrata.tiers.pool.place import (
    check_fit,
    make_pool,
    pool_path,
    slow_memory,
    without_memory,
)

logger = logging.getLogger("kvstrata.tiers.pool")


class PoolTier(FsTier):
    """A root of the fs tier in shared memory; for the options see `PoolOptions`."""

    medium = "CPU"
    locality = "LOCAL"
    Options = PoolOptions
    name = "pool"

    @classmethod
    def configs(cls, options: Mapping[str, Any]) -> tuple[FsConfig, ...]:
        """See `FsTier.configs`."""
        return (parse_options(PoolOptions, options, "pool tier").files,)

    def __init__(self, options: Mapping[str, Any], context: TierContext) -> None:
        """See `SecondaryTier.__init__`."""
        given = parse_options(PoolOptions, options, "pool tier")
        path = pool_path(given.name)
        was_there = os.path.lexists(path)
        try:
            make_pool(given.name)
            check_fit(path, given.max_bytes, without_memory(context.region))
            super().__init__(options, context)
        except TierConfigError as error:
            if not was_there:
                with suppress(OSError):  # it is missing, or somebody else's by now
                    os.rmdir(path)
            where, key = f"name: {given.name!r}: ", "root_dir: "
            if not str(error).startswith(key):
                raise
            raise TierConfigError(where + str(error).removeprefix(key)) from error
        if advice := slow_memory():
            logger.info("kvstrata pool tier: %s", advice)
