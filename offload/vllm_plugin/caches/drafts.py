"""What drafts tokens for speculative decoding, as far as it has a KV cache of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# They guess from the text, and vLLM names the target itself as their model.
_WITHOUT_MODEL = frozenset({"ngram", "ngram_gpu", "suffix"})


def drafting(vllm_config: Any) -> Any:
    """vLLM's SpeculativeConfig where the draft has a model; None otherwise."""
    speculative = getattr(vllm_config, "speculative_config", None)
    return None if getattr(speculative, "method", None) in _WITHOUT_MODEL else speculative


def draft_layers(names: Sequence[str], vllm_config: Any) -> frozenset[str]:
    """The layers of an EAGLE or MTP draft: vLLM numbers them behind the model's own, or names them
    `mtp.layers.N`.

    Their input at a position is the token that follows it, so that the last position of a page
    is not decided by the page's key.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or not speculative.use_eagle():
        return frozenset()
    own = vllm_config.model_config.get_total_num_hidden_layers()
    return frozenset(n for n in names if layer_number(n, own) >= own or "mtp" in n.split("."))


def layer_number(name: str, otherwise: int) -> int:
    """The layer's number, which is the first one in its name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), otherwise)
