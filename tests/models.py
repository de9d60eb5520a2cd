"""Tiny random checkpoints for engine tests, built on disk once, with no download.

Each builder returns a normal Hugging Face checkpoint folder (config.json, model.safetensors,
tokenizer.json, tokenizer_config.json) that `vllm.LLM` and `vllm serve` load as it is.

What the tests may rely on:
- one printable ASCII character is one token (byte-level tokenizer without merges, no BOS added);
- greedy output is always printable ASCII and never ends early, since the logits of all other
  tokens, EOS included, are zero;
- greedy output depends on the whole prompt, its first tokens included, so a KV cache that is
  wrong anywhere shows in the tokens; float32 rounding is far too small to change them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEED = 20240229
VOCAB_SIZE = 259  # 256 bytes, then <bos>, <eos>, <pad>
MAX_POSITION_EMBEDDINGS = 4096  # tokens
PRINTABLE = range(32, 127)  # the tokens that greedy decoding can produce


def tiny_llama(cache_dir: Path, kv_heads: int = 4) -> Path:
    """Llama: 3 layers, 8 attention heads, `kv_heads` (1, 2, 4 or 8) KV heads of size 32."""
    return build(cache_dir, f"tiny-llama-kv{kv_heads}", lambda: llama(kv_heads))


def tiny_gemma3(cache_dir: Path) -> Path:
    """Gemma-3 text: 5 sliding layers (64 tokens), 1 full layer, 4 KV heads of size 32."""
    return build(cache_dir, "tiny-gemma3", _gemma3)


def tiny_deepseek_v2(cache_dir: Path) -> Path:
    """DeepSeek-V2: 2 dense layers with MLA; 576 elements per token (latent 512 + RoPE 64).

    The latent sizes are those that vLLM's CPU MLA kernel is compiled for.
    """
    return build(cache_dir, "tiny-deepseek-v2", _deepseek_v2)


def llama(kv_heads: int) -> PreTrainedModel:
    """The model of `tiny_llama`, not yet on disk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            **common(),
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=kv_heads,
            head_dim=32,
            tie_word_embeddings=False,
        )
    )
    return randomize(model, embed_std=0.1, qk_gain=1.6)


def _gemma3() -> PreTrainedModel:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    model = Gemma3ForCausalLM(
        Gemma3TextConfig(
            **common(),
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            sliding_window=64,
            # attention scores have a standard deviation of head_dim / sqrt(32 * 6), about 2.3
            query_pre_attn_scalar=6,
        )
    )
    # Gemma multiplies embeddings by sqrt(hidden_size), here 16.
    return randomize(model, embed_std=0.1 / 16, qk_gain=1.0)


def _deepseek_v2() -> PreTrainedModel:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    layers = 2
    model = DeepseekV2ForCausalLM(
        DeepseekV2Config(
            **common(),
            num_hidden_layers=layers,
            num_attention_heads=4,
            first_k_dense_replace=layers,  # no expert layers
            kv_lora_rank=512,
            q_lora_rank=None,
            qk_nope_head_dim=32,
            qk_rope_head_dim=64,
            v_head_dim=32,
            # As the real model: with plain RoPE, vLLM 0.32's CPU kernel rotates MLA's strided
            # key wrongly, and its output even varies between runs.
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 2.0,
                "original_max_position_embeddings": MAX_POSITION_EMBEDDINGS // 2,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        )
    )
    return randomize(model, embed_std=0.1, qk_gain=1.0)


def common() -> dict[str, int]:
    """Configuration keys that all the models share."""
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "intermediate_size": 512,
        "max_position_embeddings": MAX_POSITION_EMBEDDINGS,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }


def randomize(model: PreTrainedModel, embed_std: float, qk_gain: float) -> PreTrainedModel:
    """Draw float32 weights that make the output sensitive to every prompt token.

    Linear layers keep the variance of their input (std 1/sqrt(fan_in)). Small embeddings let
    attention outweigh the residual of the current token; query and key weights larger than usual
    by `qk_gain` let single tokens stand out in a long prompt. Norm weights stay as created.
    """
    import torch

    torch.manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() < 2:
                continue
            std = embed_std if "embed_tokens" in name else parameter.shape[1] ** -0.5
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                std *= qk_gain
            parameter.normal_(std=std)
        mute = torch.ones(VOCAB_SIZE, dtype=torch.bool)
        mute[list(PRINTABLE)] = False
        model.get_output_embeddings().weight[mute] = 0
    return model


def build(cache_dir: Path, name: str, make_model: Callable[[], PreTrainedModel]) -> Path:
    """Return the checkpoint's folder, building it beside its final name and renaming it.

    The folder's name holds a digest of the recipes (this file and its siblings): a changed one
    never meets an old checkpoint.
    """
    recipes = sorted(Path(__file__).parent.glob("*models.py"))
    recipe = hashlib.sha256(b"".join(path.read_bytes() for path in recipes)).hexdigest()[:8]
    path = Path(cache_dir) / f"{name}-{recipe}"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=path.parent))
    try:
        make_model().float().save_pretrained(building)
        _save_tokenizer(building)
        os.rename(building, path)
    except OSError:
        if not path.exists():  # otherwise another process built it first
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return path


def _save_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer in which the id of a byte is its value."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>", "<pad>"])  # ids 256, 257, 258
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=MAX_POSITION_EMBEDDINGS,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def _byte_vocabulary() -> dict[str, int]:
    """Map GPT-2's printable stand-in character of each byte to the byte's value.

    Bytes that print as themselves stand for themselves, the others take the code points from 256
    on, in order (`bytes_to_unicode` of OpenAI's GPT-2 encoder).
    """
    own = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {
        chr(256 + rank): byte for rank, byte in enumerate(others)
    }
