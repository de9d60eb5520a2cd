"""Tiny random checkpoints of models whose layers keep different kinds of KV cache.

Built on `tests/models.py`; see there for what tests may rely on.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tests.models import VOCAB_SIZE, build, common, randomize

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tiny_gemma3n(cache_dir: Path) -> Path:
    """Gemma-3n text: 10 layers, the last 5 of which read the caches of the 4th and the 5th."""
    return build(cache_dir, "tiny-gemma3n", _gemma3n)


def tiny_gemma4(cache_dir: Path) -> Path:
    """Gemma-4 text: 4 sliding layers (64 tokens) with heads of 32, 2 full ones with heads of 64.

    The last layer of each kind reads the cache of the one before.
    """
    return build(cache_dir, "tiny-gemma4", _gemma4)


def tiny_granite_hybrid(cache_dir: Path) -> Path:
    """Granite-4 hybrid: 3 Mamba-2 layers and 1 attention layer with 4 KV heads of size 32."""
    return build(cache_dir, "tiny-granite-hybrid", _granite_hybrid)


def tiny_lfm2(cache_dir: Path) -> Path:
    """LFM2: 2 short convolutions and 2 attention layers with 4 KV heads of size 32."""
    return build(cache_dir, "tiny-lfm2", _lfm2)


def _gemma3n() -> PreTrainedModel:
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    model = Gemma3nForCausalLM(
        Gemma3nTextConfig(
            **common(),
            num_hidden_layers=10,
            num_kv_shared_layers=5,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            sliding_window=64,
            vocab_size_per_layer_input=VOCAB_SIZE,
            hidden_size_per_layer_input=16,
            laurel_rank=16,
        )
    )
    # Gemma multiplies embeddings by sqrt(hidden_size), here 16.
    return randomize(model, embed_std=0.1 / 16, qk_gain=1.0)


def _gemma4() -> PreTrainedModel:
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    model = Gemma4ForCausalLM(
        Gemma4TextConfig(
            **common(),
            num_hidden_layers=6,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
            num_kv_shared_layers=2,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            global_head_dim=64,
            sliding_window=64,
            vocab_size_per_layer_input=VOCAB_SIZE,
            hidden_size_per_layer_input=16,
        )
    )
    return randomize(model, embed_std=0.1 / 16, qk_gain=1.0)


def _granite_hybrid() -> PreTrainedModel:
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    model = GraniteMoeHybridForCausalLM(
        GraniteMoeHybridConfig(
            **common(),
            num_hidden_layers=4,
            layer_types=["mamba", "mamba", "attention", "mamba"],
            num_attention_heads=8,
            num_key_value_heads=4,
            attention_multiplier=32**-0.5,
            position_embedding_type="rope",
            num_local_experts=0,  # no expert layers
            shared_intermediate_size=512,
            mamba_n_heads=16,
            mamba_d_head=32,
            mamba_d_state=16,
            mamba_chunk_size=32,
            tie_word_embeddings=False,
        )
    )
    return randomize(model, embed_std=0.1, qk_gain=1.6)


def _lfm2() -> PreTrainedModel:
    from transformers import Lfm2Config, Lfm2ForCausalLM

    model = Lfm2ForCausalLM(
        Lfm2Config(
            **common(),
            num_hidden_layers=4,
            layer_types=["conv", "full_attention", "conv", "full_attention"],
            num_attention_heads=8,
            num_key_value_heads=4,
            block_auto_adjust_ff_dim=False,
            # vLLM reads these two; transformers takes the hidden size
            conv_dim=256,
            block_dim=256,
        )
    )
    return randomize(model, embed_std=0.1, qk_gain=1.6)
