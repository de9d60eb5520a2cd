"""A random Llama whose prefill is slow enough to be measured."""

import json
from pathlib import Path
from typing import Any

# Four heads share a KV head, as in Llama 3.
_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "float32",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
VOCABULARY = _CONFIG["vocab_size"]
# K and V of all layers in float32
TOKEN_BYTES = (
    2 * 4 * _CONFIG["num_hidden_layers"] * _CONFIG["num_key_value_heads"] * _CONFIG["head_dim"]
)
# of `vllm.LLM`: it has no weights in files, and no tokenizer
ARGUMENTS = {"load_format": "dummy", "skip_tokenizer_init": True}


def make_model(folder: Path) -> Path:
    """The model's folder in this one."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(_CONFIG))
    return model
