"""The options of the pool tier: a name, and how much memory it may take."""

from __future__ import annotations

from dataclasses import dataclass

from kvstrata.tiers.fs.config import FsConfig
from kvstrata.tiers.options import option, parse_bytes, same_option
from kvstrata.tiers.pool.place import DIR_MODE, FILE_MODE, parse_name, pool_path


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
