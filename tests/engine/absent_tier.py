"""A tier whose medium is not there, which shows only when an engine opens it."""

from collections.abc import Mapping
from typing import Any

from kvstrata.tiers.base import TierConfigError, TierContext
from kvstrata.tiers.memory import MemoryTier

CAUSE = "nobody answers; start the store first"


class AbsentTier(MemoryTier):
    """Refuses to be opened."""

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Nothing is wrong with them."""

    def __init__(self, options: Mapping[str, Any], context: TierContext) -> None:
        """Raises TierConfigError."""
        raise TierConfigError(CAUSE)
