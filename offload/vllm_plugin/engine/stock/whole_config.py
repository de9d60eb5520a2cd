"""The engine's whole configuration, which vLLM does not hand on to the tiers of its own spec."""

from __future__ import annotations

import sys
from types import FrameType

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig


def whole_config(engine_id: str) -> tuple[VllmConfig, KVCacheConfig]:
    """What vLLM's connector was made with, by a caller of whom this is called.

    An `OffloadingSpec` is told a few fields of it, which do not say what decides K and V, and in
    the scheduler's process vLLM has no current configuration. Its connector makes the spec and has
    the spec make the tiers, so it is among the callers, with both as `vllm_config` and
    `kv_cache_config` (vLLM 0.31 to 0.33).

    Args:
        engine_id: of the engine that is meant.

    Raises:
        RuntimeError: no caller has them.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        config, caches = (frame.f_locals.get(name) for name in ("vllm_config", "kv_cache_config"))
        if isinstance(config, VllmConfig) and isinstance(caches, KVCacheConfig):
            transfer = config.kv_transfer_config
            if transfer is not None and transfer.engine_id == engine_id:
                return config, caches
        frame = frame.f_back
    raise RuntimeError(
        "kvstrata's tiers must know the engine's whole configuration, or pages of one model could "
        "pass for another's, and vLLM's connector is not among those who made this one: make the "
        "spec by a connector, or use a supported vLLM"
    )
