"""The pool tier: pages of a node in shared memory, for all servers of a user, and the next ones."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from kvstrata.tiers.base import TierConfigError, TierContext
from kvstrata.tiers.fs.config import FsConfig
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.options import option, parse_bytes, parse_options, same_option
from kvstrata.tiers.pool.place import (
    DIR_MODE,
    FILE_MODE,
    check_fit,
    make_pool,
    parse_name,
    pool_path,
    slow_memory,
)

logger = logging.getLogger("kvstrata.tiers.pool")


@dataclass(frozen=True, slots=True)
class PoolOptions:
    """Options of the pool tier, checked."""

    name: str = option(
        parse_name,
        'the pool\'s name, for example "node"; all servers of this user that give it share the '
        "pool, which is `/dev/shm/kvstrata-pool-<uid>-<name>`",
        other_names="pool pool_name id",
    )
    max_bytes: int = option(
        parse_bytes,
        'most bytes of the pool, for example "64GiB"; the least recently used pages go first. '
        "Together with the CPU tiers of the node it must fit into memory",
        other_names="max_size size capacity quota",
    )
    n_read_threads: int = same_option(FsConfig, "n_read_threads")
    n_write_threads: int = same_option(FsConfig, "n_write_threads")

    @property
    def files(self) -> FsConfig:
        """The same as options of the fs tier."""
        return FsConfig(
            pool_path(self.name),
            n_read_threads=self.n_read_threads,
            n_write_threads=self.n_write_threads,
            io="buffered",  # its page cache is the pool itself
            max_bytes=self.max_bytes,
            file_mode=FILE_MODE,
            dir_mode=DIR_MODE,
        )


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
            check_fit(path, given.max_bytes, context.region)
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
