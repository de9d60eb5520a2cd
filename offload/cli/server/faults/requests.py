"""Requests that are not looked up, and wishes that are not granted."""

from __future__ import annotations

from collections.abc import Iterator

from kvstrata.offload.cli.server.look import Finding, Look
from kvstrata.offload.cli.server.words import count
from kvstrata.offload.metering.names import (
    PINS_REFUSED,
    PRIMARY,
    QUERY_TOKENS,
    WRONG_WISHES,
)

_PROMPTS, _GPU_HITS = "vllm:prompt_tokens", "vllm:prefix_cache_hits"
# That many tokens of prompts without one chunk are no chance.
_LEAST_TOKENS = 100_000


def no_lookups(look: Look) -> Iterator[Finding]:
    """Prompts are computed, and no tier is asked for them."""
    computed = look.total(_PROMPTS) - look.total(_GPU_HITS)
    if not look.ours or computed < _LEAST_TOKENS or look.total(QUERY_TOKENS, tier=PRIMARY):
        return
    yield Finding(
        "no look-ups",
        PRIMARY,
        f"{count(computed)} tokens of prompts were computed, and no tier was asked for any of them",
        "start vLLM with prefix caching (without --no-enable-prefix-caching); if prompts are "
        "shorter than a chunk, lower blocks_per_chunk or block_size",
    )


def wishes(look: Look) -> Iterator[Finding]:
    """What requests wished, and did not get."""
    if wrong := look.total(WRONG_WISHES):
        yield Finding(
            "wrong wishes",
            "kv_transfer_params",
            f"{count(wrong)} wishes in kv_transfer_params were not understood, so their pages were "
            "kept out of tiers, or were not pinned",
            "the server's log names each form once a minute: correct the client (docs/manager.md)",
        )
    if refused := look.total(PINS_REFUSED):
        yield Finding(
            "pins refused",
            PRIMARY,
            f"{count(refused)} pages that requests wished pinned were not, as pins hold their "
            "share of the CPU tier",
            "raise pin_fraction or cpu_bytes_to_use, or let clients pin less (pin_seconds)",
        )
