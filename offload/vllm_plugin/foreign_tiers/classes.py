"""Classes: from a tier for vLLM's own manager to the class that works in ours."""

from __future__ import annotations

import functools

from vllm.v1.kv_offload.tiering.base import SecondaryTierManager
from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

from kvstrata.offload.vllm_plugin.foreign_tiers.tier import ForeignTier
from kvstrata.tiers.base import TierConfigError


def named(name: str) -> type[ForeignTier]:
    """The tier that vLLM itself calls so.

    Raises:
        TierConfigError: this vLLM has no such tier, or it lacks what it needs.
    """
    try:
        found = SecondaryTierFactory.get_tier_class({"type": name})
    except Exception as error:  # a package that is not installed, as a rule
        raise TierConfigError(
            f"type {name!r}, a tier of vLLM's own, cannot be used: {type(error).__name__}: {error}"
            "; install what it needs, or remove the entry"
        ) from error
    return adapted(found, name)


@functools.cache
def adapted(foreign: type[SecondaryTierManager], name: str) -> type[ForeignTier]:
    """The class, always the same one, of a tier that is called so in the configuration."""
    medium = foreign.medium
    serves = foreign.serve_external_requests is not SecondaryTierManager.serve_external_requests
    return type(
        foreign.__name__,
        (ForeignTier,),
        {
            "__doc__": f"`{foreign.__module__}.{foreign.__name__}` in our manager.",
            "foreign": foreign,
            "type_name": name,
            "serves": serves,
            "tells_events": foreign.take_events is not SecondaryTierManager.take_events,
            "whole_loads": serves,
            "medium": medium.value if medium is not None else None,
        },
    )
