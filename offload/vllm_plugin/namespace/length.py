"""Whether what a model computes depends on `max_model_len`.

It rarely does, and a user who raises it must not lose a cache for nothing. So it is left out of
the namespace for those who are known not to look at it: kinds of RoPE that take nothing from it,
in models of vLLM itself whose code does not read it, or reads it for sizes of buffers alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vllm.model_executor.models.registry import ModelRegistry

# Kinds of RoPE whose frequencies are functions of the checkpoint's configuration alone
# (vllm/model_executor/layers/rotary_embedding/ of 0.31 to 0.33). Not among them: "longrope", which
# chooses its factors by max_model_len, and "dynamic", whose base follows the length.
PLAIN_ROPE = frozenset(
    {
        "default",
        "linear",
        "ntk",
        "llama3",
        "yarn",
        "deepseek_yarn",
        "deepseek_llama_scaling",
        "proportional",
        "mrope",
        "bailing_mrope",
        "openpangu",
        "mllama4",
    }
)
# Other attention whose rotation was not shown to be independent of the length.
_UNPROVEN = ("use_fope", "dual_chunk_attention_config")
_SETTINGS = ("rope_parameters", "rope_scaling")

_MODELS = ("vllm.model_executor.models.", "vllm.models.")
# Models of vLLM that take something from max_model_len, by module, and what.
READERS = {
    "llama4": "the default of attention temperature tuning",
    "mllama4": "its text model is Llama 4",
    "llama4_eagle": "its layers are Llama 4's",
    "bert_with_rope": "NomicBert's RoPE is made for this length (models/config.py)",
    "nano_nemotron_vl": "the number of tiles of an image; positions of the sound encoder",
    "parakeet": "positions of the sound encoder",
    "dots3_note": "the frames that are taken of a video",
    "diffusion_gemma": "where the last canvas ends",
    "step5": "the positions that its RoPE and sparse attention are made for",
    "transformers": "the code is Transformers', whose RoPE may follow the length",
}


def depends_on_length(model: Any) -> bool:
    """Whether `max_model_len` may decide what this model computes; yes if in doubt.

    Args:
        model: vLLM's ModelConfig.
    """
    module = module_of(model)
    if not module.startswith(_MODELS) or family_of(module) in READERS:
        return True
    settings = model.hf_config.to_dict()
    return any(kind not in PLAIN_ROPE for kind in _rope_kinds(settings)) or _names_reader(settings)


def module_of(model: Any) -> str:
    """The module of the class that vLLM runs for this model; "" if that cannot be told."""
    return _module(getattr(model, "architecture", None) or "")


def _module(architecture: str) -> str:
    registered: Any = ModelRegistry.models.get(architecture)
    if registered is None:
        return ""
    module = getattr(registered, "module_name", None)
    return str(module or registered.model_cls.__module__)


def family_of(module: str) -> str:
    """`vllm.models.deepseek_v4.nvidia.model` -> `deepseek_v4`."""
    for prefix in _MODELS:
        module = module.removeprefix(prefix)
    return module.split(".", 1)[0]


def _names_reader(value: Any) -> bool:
    """Whether a part of a model is one that reads the length: any text model can be a part."""
    if isinstance(value, Mapping):
        kind = str(value.get("model_type"))
        families = [family_of(_module(str(name))) for name in value.get("architectures") or ()]
        return (
            kind.startswith(tuple(READERS))
            or any(family in READERS for family in families)
            or any(_names_reader(item) for item in value.values())
        )
    return isinstance(value, list | tuple) and any(_names_reader(item) for item in value)


def _rope_kinds(value: Any) -> Iterator[str]:
    """The kinds of RoPE that a configuration speaks of, at any depth."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key in _UNPROVEN and item:
                yield str(key)
            elif key in _SETTINGS and isinstance(item, Mapping):
                yield from _kinds_in(item)
            else:
                yield from _rope_kinds(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _rope_kinds(item)


def _kinds_in(settings: Mapping[Any, Any]) -> Iterator[str]:
    """Of one setting: for all layers, or one for each kind of layer."""
    inner = [item for item in settings.values() if isinstance(item, Mapping)]
    if inner and len(inner) == len(settings):
        for item in inner:
            yield from _kinds_in(item)
        return
    yield from (str(settings[key]) for key in ("rope_type", "type") if key in settings)
    yield from (key for key in _UNPROVEN if settings.get(key))
