"""The object tier: every page an object in a bucket of S3, Google Cloud Storage or Azure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvstrata.tiers.base import TierContext
from kvstrata.tiers.object.config import ObjectConfig
from kvstrata.tiers.process.medium import MediumSpec
from kvstrata.tiers.process.tier import ProcessTier


class ObjectTier(ProcessTier):
    """Pages as objects below `url`; for the options see `ObjectConfig`."""

    medium = "STORAGE"
    locality = "REMOTE"
    Options = ObjectConfig
    name = "object"
    rejects = True

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """See `SecondaryTier.check_options`; the package obstore must be there."""
        ObjectConfig.parse(options)

    def __init__(self, options: Mapping[str, Any], context: TierContext) -> None:
        """See `SecondaryTier.__init__`."""
        config = ObjectConfig.parse(options)
        from kvstrata.tiers.object.opening import open_bucket

        self.opened = open_bucket(config, context)
        super().__init__(
            context,
            [
                MediumSpec(
                    "kvstrata.tiers.object.medium:ObjectMedium",
                    self.opened,
                    trusted=self.opened.trusted,
                )
            ],
            config.n_read_threads,
            config.n_write_threads,
        )

    def how_to_trust(self) -> str:
        """See `SecondaryTier.how_to_trust`."""
        paths = self.opened.paths
        return (
            f"Pages that differed are below {self.opened.config.url}/{paths.quarantine}, beside "
            f"those that the model computed. Then remove {paths.distrust} there, and restart."
        )
