"""Tiny drafts for the speculative decoding of `tiny_llama`; see `tests/models.py`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tests.models import SEED, build, llama

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tiny_llama_window(cache_dir: Path) -> Path:
    """The weights of `tiny_llama`, with sliding windows of 512 tokens.

    A draft that is always right for shorter sequences, as long as its own KV cache is; vLLM keeps
    that in a group of its own.
    """
    return build(cache_dir, "tiny-llama-window", _llama_window)


def tiny_eagle(cache_dir: Path) -> Path:
    """EAGLE: one Llama layer behind a random mix of the target's state and the next token."""
    return build(cache_dir, "tiny-eagle", _eagle)


def _llama_window() -> PreTrainedModel:
    model = llama(kv_heads=4)
    model.config.layer_types = ["sliding_attention"] * model.config.num_hidden_layers
    model.config.sliding_window = 512
    return model


def _eagle() -> PreTrainedModel:
    import torch
    from transformers import LlamaModel

    whole = llama(kv_heads=4)
    whole.config.num_hidden_layers = 1

    class LlamaForCausalLM(LlamaModel):  # a checkpoint names its class; vLLM looks for this one
        pass

    model = LlamaForCausalLM(whole.config)
    model.load_state_dict(whole.model.state_dict(), strict=False)
    # EAGLE has neither norm, and one more projection
    model.layers[0].input_layernorm = torch.nn.Identity()
    model.norm = torch.nn.Identity()
    torch.manual_seed(SEED)
    model.fc = torch.nn.Linear(2 * whole.config.hidden_size, whole.config.hidden_size, bias=False)
    return model
