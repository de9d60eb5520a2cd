"""Real configurations of vLLM for tiny checkpoints, made without an engine."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm.engine.arg_utils import EngineArgs

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rope_theta": 10_000.0,
}


def checkpoint(folder: Path, **more: Any) -> Path:
    """A Llama checkpoint with other values of config.json."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **more}))
    save_file({"w": np.zeros(8, np.float32)}, folder / "model.safetensors")
    return folder


def engine(model: Path, **more: Any) -> Any:
    """The VllmConfig of an engine with these arguments."""
    settings: dict[str, Any] = {
        "max_model_len": 1024,
        "dtype": "float32",
        "block_size": 32,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
    }
    return EngineArgs(model=str(model), **{**settings, **more}).create_engine_config()
