"""A request's `max_offload_tokens`, kept by us where vLLM's connector would end the engine over it.

With `--prefix-match-unit` a hybrid model's prompt is also stored up to the last unit, behind its
last whole block. For this partial tail the connector asserts that it is not above the request's
`max_offload_tokens` (0.32, 0.33: `_build_partial_tail_store_jobs` in offloading/scheduler.py), and
0 does not count there as a cap at all. docs/upstream.md has the report.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from vllm.v1.kv_offload.base import OffloadKey, ReqContext
from vllm.v1.kv_offload.config import OffloadingConfig

_PARAM = "max_offload_tokens"


@dataclass(frozen=True, slots=True)
class OffloadCap:
    """The request's cap, in tokens."""

    tokens: int


def has_partial_tails(config: OffloadingConfig) -> bool:
    """Whether prompts may be stored up to a token that ends no block."""
    cache = config.cache
    return cache.blocks_per_chunk == 1 and any(
        group.tokens_per_block != cache.tokens_per_hash for group in config.groups
    )


def take_cap(request: ReqContext) -> None:
    """Take the cap out of a new request, before vLLM's connector reads it, and keep it here.

    What is no cap stays: the connector says so.
    """
    params = request.kv_transfer_params
    tokens = params.get(_PARAM) if params else None
    if params and type(tokens) is int and tokens >= 0:
        params[_PARAM] = None
        request.set_state(OffloadCap(tokens))


def below_cap(keys: Collection[OffloadKey], request: ReqContext) -> Collection[OffloadKey]:
    """The keys that the request's cap lets be stored."""
    cap = request.get_state(OffloadCap)
    if cap is None:
        return keys
    return [key for key in keys if (request.get_offload_key_position(key) or 0) <= cap.tokens]
