"""A tier for the tests, of one of their media."""

from collections.abc import Sequence
from pathlib import Path

from kvstrata.tiers.base import TierContext
from kvstrata.tiers.process.medium import MediumSpec
from kvstrata.tiers.process.tier import ProcessTier


class FolderTier(ProcessTier):
    """A tier of one of the test's media, or of several, each in a folder of its own."""

    name = "folder"

    def __init__(self, context: TierContext, medium: str, folders: Sequence[Path]) -> None:
        media = [
            MediumSpec(f"tests.tiers.process.media:{medium}", str(each), each.name)
            for each in folders
        ]
        super().__init__(context, media, 2, 2)
