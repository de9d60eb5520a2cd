"""Which of the configured tiers an engine opens, and under which namespace."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from kvstrata.offload.config.offload_config import OffloadConfig
from kvstrata.offload.config.stock_entry import StockEntry
from kvstrata.offload.secondary.guard import GuardedTier, check_words
from kvstrata.offload.secondary.late import LateTier
from kvstrata.offload.secondary.tier import TierLink
from kvstrata.tiers.base import EPOCH, SecondaryTier, TierConfigError, TierContext
from kvstrata.tiers.registry import TierEntry, tier_class, tier_options

logger = logging.getLogger("kvstrata")


def usable_entries(settings: OffloadConfig | StockEntry, *, lora: bool) -> tuple[TierEntry, ...]:
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

    def __call__(self, deadline_s: float, clock: Callable[[], float]) -> list[TierLink]:
        """The tiers, each behind a guard; for the arguments see `OpenTiers`.

        Raises:
            TierConfigError: one cannot be used.
        """
        context = self._context
        if self._private:
            namespace = {**context.namespace, EPOCH: secrets.token_hex(8)}
            context = replace(context, namespace=namespace)
        self._private = True
        return [
            TierLink(
                entry.name,
                _guarded(entry, context),
                index,
                entry.promotion_deadline_s or deadline_s,
                clock,
                lookup_deadline_s=entry.lookup_deadline_s,
                medium=tier_class(entry.entry).medium,
                may_load=not entry.store_only,
                may_store=not entry.load_only,
                fills=entry.fill,
                store_threshold=entry.store_threshold,
                max_tracker_size=entry.max_tracker_size,
                kv_events=entry.kv_events,
            )
            for index, entry in enumerate(self._entries)
        ]


def _guarded(entry: TierEntry, context: TierContext) -> GuardedTier:
    """The tier, or what stands for it until it can be opened."""
    opens = partial(_open, entry, context)
    try:
        return GuardedTier(entry.name, opens())
    except TierConfigError as error:
        if entry.is_required:
            raise
        logger.warning(
            "tier %s cannot be used yet (%s); the engine starts without it, and looks for it again "
            "and again",
            entry.name,
            error,
        )
        cause = str(error)
    late = LateTier(entry.name, tier_class(entry.entry), opens, cause)
    late.guard = guard = GuardedTier(entry.name, late)
    return guard


def _open(entry: TierEntry, context: TierContext) -> SecondaryTier:
    tier = tier_class(entry.entry)(tier_options(entry.entry), context)
    tier.locality = entry.locality or tier.locality
    check_words(entry.name, tier)
    return tier
