"""Copying from and to a pool: a root of the fs tier that must never take more than its memory."""

from __future__ import annotations

from kvstrata.offload.cli.copy.directory import DirectoryPlace
from kvstrata.offload.cli.copy.place import PlaceError
from kvstrata.tiers.base import TierConfigError, TierContext
from kvstrata.tiers.fs.budget.limits import Limits
from kvstrata.tiers.fs.config import FsConfig
from kvstrata.tiers.pool.place import check_fit, check_own, make_pool, most_bytes
from kvstrata.tiers.pool.tools import living
from kvstrata.tiers.process.medium import Medium


class PoolPlace(DirectoryPlace):
    """This user's pool `name`, whose files are below `config.root_dir`.

    Where nobody said how large it may be, its servers do; and where there are none, what they
    would have to leave free.

    Raises:
        TierConfigError: what is there is not this user's alone.
    """

    more_room = (
        "free some of the pool (kvstrata gc), or give TO as a tier of type pool with a larger "
        "max_bytes"
    )

    def __init__(self, name: str, config: FsConfig) -> None:
        check_own(name)
        super().__init__(config.root_dir, config)
        self._name = name

    def target(self, context: TierContext) -> Medium:
        """See `Place.target`; refused as the pool tier refuses it."""
        try:
            path = make_pool(self._name)
            if isinstance(self.config.max_bytes, int):
                check_fit(path, self.config.max_bytes, 0)
        except TierConfigError as error:
            raise PlaceError(str(error)) from None
        return super().target(context)

    def _limits(self, config: FsConfig) -> Limits:
        limits = super()._limits(config)
        if limits.max_bytes or living(config.root_dir).members:
            return limits
        return limits._replace(max_bytes=max(1, most_bytes(config.root_dir)))
