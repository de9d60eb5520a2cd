"""Which of the configured tiers an engine opens, and under which namespace."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from dataclasses import replace

from kvstrata.offload.config.offload_config import OffloadConfig
from kvstrata.offload.secondary.guard import GuardedTier, check_words
from kvstrata.offload.secondary.tier import NamedTier
from kvstrata.tiers.base import EPOCH, SecondaryTier, TierContext
from kvstrata.tiers.registry import TierEntry, tier_class, tier_options

logger = logging.getLogger("kvstrata")


def usable_entries(settings: OffloadConfig, *, lora: bool) -> tuple[TierEntry, ...]:
    """The configured tiers; none where a key does not say which LoRA adapter a page is of."""
    if settings.tiers and lora and not settings.lora_paths_immutable:
        logger.warning(
            "secondary tiers are off: with LoRA a page's key names the adapter's path but not "
            'its content; set "lora_paths_immutable": true if a path never changes content'
        )
        return ()
    return settings.tiers


class TierOpener:
    """Opens the tiers when called: at first under the engine's namespace, then, since weights may
    have changed, under one of their own each time.

    Args:
        entries: the tiers in the order of look-up.
        context: what they are told.
        private: whether the first time is as the others, since the weights are not fixed.
    """

    def __init__(
        self, entries: Sequence[TierEntry], context: TierContext, *, private: bool
    ) -> None:
        self._entries = entries
        self._context = context
        self._private = private

    def __call__(self) -> list[NamedTier]:
        """The tiers, each behind a guard.

        Raises:
            TierConfigError: one cannot be used.
        """
        context = self._context
        if self._private:
            namespace = {**context.namespace, EPOCH: secrets.token_hex(8)}
            context = replace(context, namespace=namespace)
        self._private = True
        return [_open(entry, context) for entry in self._entries]


def _open(entry: TierEntry, context: TierContext) -> NamedTier:
    cls: type[SecondaryTier] = tier_class(entry.entry)
    tier = cls(tier_options(entry.entry), context)
    tier.locality = entry.locality or tier.locality
    check_words(entry.name, tier)
    return NamedTier(
        entry.name,
        GuardedTier(entry.name, tier),
        cls.medium,
        entry.store_threshold,
        entry.max_tracker_size,
        entry.kv_events,
    )
