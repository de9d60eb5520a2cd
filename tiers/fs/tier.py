"""The filesystem tier: every page a safetensors file."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping
from typing import Any, ClassVar

from kvstrata.tiers.base import TierConfigError, TierContext
from kvstrata.tiers.fs.budget.stamps import first_access
from kvstrata.tiers.fs.cold_start import explain_cold_start
from kvstrata.tiers.fs.config import FsConfig
from kvstrata.tiers.fs.startup import Opened, open_root
from kvstrata.tiers.process.medium import MediumSpec
from kvstrata.tiers.process.tier import ProcessTier

logger = logging.getLogger("kvstrata.tiers.fs")

# What a dead disk or server says, and not a wrong option. With a list of disks one goes on.
_LOST = (
    *(errno.EIO, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ESTALE, errno.EUCLEAN),
    *(errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EREMOTEIO),
)


class FsTier(ProcessTier):
    """Pages as files below the directories in `root_dir`; for the options see `FsConfig`."""

    medium = "STORAGE"
    Options: ClassVar[type[Any]] = FsConfig
    name = "fs"
    rejects = True
    page_causes = ProcessTier.page_causes | {
        *("symlink", "not-regular", "unreadable", "denied", "books"),
    }

    @classmethod
    def configs(cls, options: Mapping[str, Any]) -> tuple[FsConfig, ...]:
        """The options, checked, of each root directory.

        Raises:
            TierConfigError: naming the key, the value and the remedy.
        """
        return FsConfig.parse(options)

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """See `SecondaryTier.check_options`."""
        cls.configs(options)

    @classmethod
    def directories(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """See `SecondaryTier.directories`."""
        return tuple(config.root_dir for config in cls.configs(options))

    def __init__(self, options: Mapping[str, Any], context: TierContext) -> None:
        """See `SecondaryTier.__init__`."""
        configs = self.configs(options)
        opened: dict[str, Opened] = {}
        for config in configs:
            try:
                opened[config.root_dir] = open_root(config, context)
            except TierConfigError as error:
                lost = isinstance(error.__cause__, OSError) and error.__cause__.errno in _LOST
                if not lost or (config is configs[-1] and not opened):
                    raise
                logger.warning("kvstrata fs tier: %s; going on without that disk", error)
        self.paths = [each.paths for each in opened.values()]  # in the order of `processes`
        explain_cold_start(self.paths, context.namespace)
        super().__init__(
            context,
            [
                MediumSpec("kvstrata.tiers.fs.medium:FsMedium", each, name, each.trusted)
                for name, each in opened.items()
            ],
            configs[0].n_read_threads,
            configs[0].n_write_threads,
            first_access(),
        )
        self._counters.update(evicted_pages=0, evicted_bytes=0, swept_temporaries=0)

    def how_to_trust(self) -> str:
        """See `SecondaryTier.how_to_trust`."""
        names = " and ".join(f"`kvstrata trust {each.root} {each.name}`" for each in self.paths)
        return (
            f"Pages that differed are in {self.paths[0].quarantine} beside those that the "
            f"model computed. Then run {names}, which all servers hear within seconds."
        )
