"""The names of an engine's weights: SHA-256 over the whole content of their files."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm import envs
from vllm.config import VllmConfig

from kvstrata.offload.vllm_plugin.caches.drafts import drafting
from kvstrata.offload.vllm_plugin.weights.content import (
    Attempt,
    Found,
    Gather,
    attempt,
    find_digests,
    read_digests,
    share,
    threads_for,
)
from kvstrata.offload.vllm_plugin.weights.identity import Identity
from kvstrata.offload.vllm_plugin.weights.memory import DigestMemory, default_memory
from kvstrata.offload.vllm_plugin.weights.source import WeightSource
from kvstrata.offload.vllm_plugin.weights.watch import watch_entry
from kvstrata.tiers.base import unseen, unseen_reason

logger = logging.getLogger("kvstrata")

# The load formats that read nothing but the files which `weight_files` finds (vLLM 0.31 to 0.33,
# model_executor/model_loader; "gguf" is its plugin's). Any other is taken for one that does not:
# of "npcache" a copy in another form counts, "ipc_cache", "modelexpress" and "tensorizer" read
# from elsewhere, and a plugin's may do anything.
_FROM_FILES = frozenset(
    {
        *("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral", "pt"),
        *("runai_streamer", "runai_streamer_sharded", "sharded_state", "gguf"),
    }
)
# Fields of a model's own configuration that name other models whose weights it reads, without a
# revision (vLLM's Ultravox; no other model of 0.31 to 0.33 does).
_OTHER_MODELS = ("audio_model_id", "text_model_id")


class WeightNames(NamedTuple):
    """What the engine runs with.

    Attributes:
        fields: the namespace's fields.
        watch: for a `WeightWatch`; empty if no file can be seen.
    """

    fields: dict[str, str | None]
    watch: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class _Model:
    """One model's weight files, or why they cannot be seen."""

    facts: list[str]
    reason: str | None = None
    files: list[tuple[str, str]] = field(default_factory=list)
    found: dict[str, Found] = field(default_factory=dict)
    watch: list[dict[str, Any]] = field(default_factory=list)


def name_weights(vllm_config: VllmConfig, gather: Gather, rank: int) -> WeightNames:
    """Names of the engine's weights and of its draft model's.

    The names hold names inside the model, sizes and content of the weight files, and how they
    are read; no paths and no times, so that they are equal on every host and for every TP size.
    A model whose weights cannot be seen gets a name of its own at every start (and on every
    rank), made by `unseen`.

    Args:
        vllm_config: the engine's configuration.
        gather: the collective of the engine's ranks, which lie on one host and share the work;
            all of them call this. It is used twice, whatever happens.
        rank: of this process in it.
    """
    draft = getattr(drafting(vllm_config), "draft_model_config", None)
    models = {"weights": vllm_config.model_config}
    if draft is not None:
        models["draft_weights"] = draft
    loads = {
        "weights": vllm_config.load_config,
        "draft_weights": getattr(vllm_config.speculative_config, "draft_load_config", None)
        or vllm_config.load_config,
    }
    memory = default_memory()
    planned = Attempt(None)
    if rank == 0:
        planned = attempt(lambda: {n: _list(m, loads[n], memory) for n, m in models.items()})
    gathered = gather(planned)
    listed: dict[str, _Model] = gathered[0].value or {
        name: _Model([], gathered[0].error or "rank 0 has not looked") for name in models
    }
    found = {path: file for model in listed.values() for path, file in model.found.items()}
    ranks = len(gathered)

    def read() -> dict[Identity, str]:
        return read_digests(share(found, ranks)[rank], found, memory, threads_for(ranks))

    outcomes = gather(attempt(read))
    digests = {identity: digest for identity, digest in found.values() if digest is not None}
    for outcome in outcomes:
        digests |= outcome.value or {}
    errors = "; ".join(sorted({outcome.error for outcome in outcomes if outcome.error}))
    names = dict.fromkeys(loads) | {
        name: _name(model, digests, errors) for name, model in listed.items()
    }
    if rank == 0:
        _warn(models, names)
    return WeightNames(names, [entry for model in listed.values() for entry in model.watch])


def _list(model: Any, load: Any, memory: DigestMemory) -> _Model:
    load_format = str(getattr(load.load_format, "value", load.load_format))
    facts = [load_format, str(model.quantization), str(model.dtype)]
    reason = _elsewhere(model, load, load_format)
    if reason is not None:
        return _Model(facts, reason)
    revision = getattr(model, "revision", None)
    sources = [WeightSource(model.model, revision, load.download_dir, load_format)]
    config = getattr(model, "hf_config", None)
    for key in _OTHER_MODELS:
        if other := getattr(config, key, None):
            sources.append(WeightSource(other, None, load.download_dir, load_format))
    try:
        # before the files are looked at, so that what changes meanwhile counts as changed later
        watch = [watch_entry(source, source.state()) for source in sources]
        files = [
            (f"{number}/{name}" if number else name, path)
            for number, source in enumerate(sources)
            for name, path in source.files()
        ]
        found = find_digests([path for _, path in files], memory)
    except OSError as error:
        return _Model(facts, str(error))
    return _Model(facts, None, files, found, watch)


def _elsewhere(model: Any, load: Any, load_format: str) -> str | None:
    """Why the weights are not in files that can be found, if so."""
    if load_format == "dummy":
        return "load_format=dummy makes weights of its own at every start"
    if load_format not in _FROM_FILES:
        return f"load_format={load_format} may read them from anywhere"
    if getattr(model, "model_weights", ""):
        return f"they come from {model.model_weights}"
    extra = getattr(load, "model_loader_extra_config", None)
    if isinstance(extra, Mapping) and "pattern" in extra:
        return f"model_loader_extra_config names files of its own ({extra['pattern']})"
    if envs.VLLM_USE_MODELSCOPE and not os.path.exists(model.model):
        return "they come from ModelScope (give its directory as the model)"
    return None


def _name(model: _Model, digests: Mapping[Identity, str], errors: str) -> str:
    contents = [
        (name, model.found[path].identity.size, digests.get(model.found[path].identity))
        for name, path in model.files
    ]
    reason = model.reason
    if reason is None and any(digest is None for _, _, digest in contents):
        reason = errors
    if reason is not None:
        return unseen(reason)
    return hashlib.sha256(json.dumps([model.facts, contents]).encode()).hexdigest()


def _warn(models: Mapping[str, Any], names: Mapping[str, str | None]) -> None:
    for key, name in names.items():
        reason = unseen_reason(name)
        if reason is not None and "load_format=dummy" not in reason:
            logger.warning(
                "kvstrata cannot tell which weights %s has, so its files in secondary tiers will "
                "not be found after a restart: %s",
                models[key].model,
                reason,
            )
