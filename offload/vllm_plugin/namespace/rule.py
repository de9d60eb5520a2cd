"""The rule: a field of vLLM's configuration is in the namespace, or `table.py` says why not."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from vllm.config import VllmConfig

from kvstrata.offload.vllm_plugin.caches.drafts import drafting
from kvstrata.offload.vllm_plugin.namespace.files import checkpoint_files, content_of
from kvstrata.offload.vllm_plugin.namespace.length import (
    depends_on_length,
    family_of,
    module_of,
)
from kvstrata.offload.vllm_plugin.namespace.table import TABLE
from kvstrata.offload.vllm_plugin.namespace.values import plain, shortened, without

# What a Hugging Face configuration says of where it came from and how Transformers would run it.
_NOT_CONTENT = frozenset(
    {
        "_name_or_path",
        "_commit_hash",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_experts_implementation",
        "_experts_implementation_internal",
        "auto_map",
        "transformers_version",
    }
)
# The dtype that the checkpoint names; what vLLM makes of it is ModelConfig's.
_DTYPE = frozenset({"dtype", "torch_dtype"})
_SECRET = re.compile("key|secret|token|password|credential", re.IGNORECASE)
_WHOLE_DTYPES = frozenset({"auto", "float16", "bfloat16", "float32"})  # of a KV cache
# Models that take something from the generation configuration into their attention.
_GENERATION_READERS = frozenset({"llama4", "llama4_eagle", "mllama4"})


@dataclass(frozen=True, slots=True)
class _Walk:
    """What conditions look at beside the configuration that a field is of."""

    quantised: bool
    cache_quantised: bool
    download_dir: str | None


def is_quantised(vllm_config: VllmConfig) -> bool:
    """Whether weights of the model or its draft are quantised."""
    speculative = drafting(vllm_config)
    draft = getattr(speculative, "draft_model_config", None)
    models = (vllm_config.model_config, speculative, draft)
    return any(getattr(each, "quantization", None) for each in models)


def is_cache_quantised(vllm_config: VllmConfig) -> bool:
    """Whether the KV cache is quantised."""
    cache = getattr(vllm_config, "cache_config", None)
    return getattr(cache, "cache_dtype", "auto") not in _WHOLE_DTYPES


def deciding_fields(vllm_config: VllmConfig) -> dict[str, Any]:
    """All that decides, nested as vLLM's configuration is, as plain JSON values.

    A model's configuration has beside vLLM's fields `files`, the checkpoint's small files that
    count, and for a model class that is not vLLM's own `code`, its name.

    Raises:
        NamespaceError: a deciding field has no text that is the same in every process; names it.
    """
    walk = _Walk(
        quantised=is_quantised(vllm_config),
        cache_quantised=is_cache_quantised(vllm_config),
        download_dir=vllm_config.load_config.download_dir,
    )
    found = _fields_of(vllm_config, "VllmConfig", "", walk)
    if drafting(vllm_config) is None:
        found.pop("speculative_config", None)  # guesses from the text touch no K and V
    return found


def _fields_of(config: Any, kind: str, path: str, walk: _Walk) -> dict[str, Any]:
    """Of one configuration of the class `kind`."""
    known = TABLE[kind]
    found: dict[str, Any] = {}
    for field, value in _named(config):
        name = f"{path}{field}"
        if field in known.left_out:
            continue
        condition = _CONDITIONS.get(f"{kind}.{field}")
        if condition is not None and not condition(config, walk):
            continue
        if field in known.inner:
            inner = {}
            if value is not None:
                inner = _fields_of(value, known.inner[field], f"{name}.", walk)
            if inner:
                found[field] = inner
            continue
        read = _VALUES.get(f"{kind}.{field}")
        found[field] = shortened(read(config, value, name) if read else plain(value, name))
    if kind == "ModelConfig":
        found.update(_beside(config, walk))
    return found


def _named(config: Any) -> list[tuple[str, Any]]:
    """Names and values of a configuration's fields; of another object, its attributes."""
    if dataclasses.is_dataclass(config):
        # A field that is set later may be absent before.
        names = [field.name for field in dataclasses.fields(config) if hasattr(config, field.name)]
        return [(name, getattr(config, name)) for name in names]
    attributes = getattr(config, "__dict__", {})
    return [(name, value) for name, value in attributes.items() if not callable(value)]


def _beside(model: Any, walk: _Walk) -> dict[str, Any]:
    """What decides of a model that no field says."""
    found: dict[str, Any] = {}
    files = checkpoint_files(model, walk.download_dir)
    if files:
        found["files"] = files
    module = module_of(model)
    foreign = bool(module) and not module.startswith("vllm.")
    if foreign:
        found["code"] = f"{module}:{model.architecture}:{_source_of(module)}"
    # It is the model, or prepares its images.
    by_transformers = "transformers" in module.split(".") or getattr(
        model, "multimodal_config", None
    )
    if foreign or by_transformers or getattr(model, "trust_remote_code", False):
        found["transformers"] = transformers.__version__
    return found


def _source_of(module: str) -> str:
    """SHA-256 of a module's file; "unknown" where there is none."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    origin = None if spec is None else spec.origin
    return content_of(origin, module) if origin and os.path.isfile(origin) else "unknown"


# -- conditions ------------------------------------------------------------------

_CONDITIONS: Mapping[str, Callable[[Any, _Walk], bool]] = {
    "ModelConfig.max_model_len": lambda model, walk: depends_on_length(model),
    "ModelConfig.override_generation_config": lambda model, walk: (
        family_of(module_of(model)) in _GENERATION_READERS
    ),
    # It decides whether queries are quantised, too.
    **dict.fromkeys(
        (
            "AttentionConfig.backend",
            "AttentionConfig.backend_per_kind",
            "AttentionConfig.mla_prefill_backend",
            "AttentionConfig.use_trtllm_attention",
        ),
        lambda config, walk: walk.cache_quantised,
    ),
    # It decides whether activations are quantised, too.
    **dict.fromkeys(
        (
            "KernelConfig.linear_backend",
            "KernelConfig.linear_backend_per_quant",
            "KernelConfig.moe_backend",
        ),
        lambda config, walk: walk.quantised,
    ),
}


# -- values ----------------------------------------------------------------------


def _max_model_len(model: Any, value: Any, name: str) -> Any:
    """The length that the model was built for.

    With -1 vLLM builds it for the longest, and then lowers the length to what fits in memory.
    """
    if getattr(model, "original_max_model_len", None) == -1:
        return "auto"
    return plain(value, name)


def _generation(model: Any, value: Any, name: str) -> Any:
    """What Llama 4 takes from it and from the checkpoint's generation_config.json."""
    settings = {**model.try_get_generation_config(), **(value or {})}
    return plain(
        {key: settings[key] for key in ("attn_temperature_tuning",) if key in settings}, name
    )


def _hf_config(model: Any, value: Any, name: str) -> Any:
    left_out = _NOT_CONTENT
    if getattr(model, "trust_remote_code", False):
        left_out -= {"auto_map"}  # it names the classes that may run
    found = without(plain(value, name), left_out)
    if isinstance(found, dict):
        found = {key: item for key, item in found.items() if key not in _DTYPE}
        file = found.get("quantization_config_file")  # of torchao, by hf_overrides
        if isinstance(file, str):
            found["quantization_config_file"] = content_of(file, f"{name}.quantization_config_file")
    return found


def _hf_text_config(model: Any, value: Any, name: str) -> Any:
    """Of a text model it is hf_config itself."""
    return None if value is getattr(model, "hf_config", None) else _hf_config(model, value, name)


def _scale_file(config: Any, value: Any, name: str) -> Any:
    return None if value is None else content_of(str(value), name)


def _without_secrets(config: Any, value: Any, name: str) -> Any:
    found = plain(value, name)
    if isinstance(found, dict):
        found = {key: item for key, item in found.items() if not _SECRET.search(key)}
    return found


_VALUES: Mapping[str, Callable[[Any, Any, str], Any]] = {
    # what vLLM made of "auto"
    "ModelConfig.convert": lambda model, value, name: plain(
        getattr(model, "convert_type", value), name
    ),
    "ModelConfig.runner": lambda model, value, name: plain(
        getattr(model, "runner_type", value), name
    ),
    "ModelConfig.hf_config": _hf_config,
    "ModelConfig.hf_text_config": _hf_text_config,
    "ModelConfig.max_model_len": _max_model_len,
    "ModelConfig.override_generation_config": _generation,
    "MultiModalConfig.mm_encoder_fp8_scale_path": _scale_file,
    "LoadConfig.model_loader_extra_config": _without_secrets,
}
