"""The small files of a checkpoint that decide what its model computes.

vLLM's configuration names them at best. Processors decide an image's pixels, quantisation files
how weights are read, and remote code everything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from kvstrata.offload.vllm_plugin.engine.errors import NamespaceError
from kvstrata.offload.vllm_plugin.namespace.values import digest_of, plain, shortened, without

# JSON files that do not count, by pattern, and why. All others do.
LEFT_OUT = {
    "config.json": "its effect, with overrides, is hf_config",
    "params.json": "Mistral's config.json",
    "generation_config.json": "sampling",
    "tokenizer.json": "keys are of token ids",
    "tokenizer_config.json": "keys are of token ids",
    "special_tokens_map.json": "keys are of token ids",
    "added_tokens.json": "keys are of token ids",
    "vocab.json": "keys are of token ids",
    "chat_template.json": "keys are of token ids",
    "*.index.json": "where weights are; their content is the weights' fingerprint",
    "trainer_state.json": "history of the training",
    "*_results.json": "history of the training",
}
# Where a file came from, not what it says.
_NOT_CONTENT = frozenset({"_name_or_path", "transformers_version", "auto_map"})


def checkpoint_files(model: Any, download_dir: str | None) -> dict[str, Any]:
    """Content of the files that count, by name; long ones by SHA-256.

    Of a plain text model none: what counts there is in hf_config. The processors' JSON files
    always count, all JSON files for multimodal and for quantised models, and Python files where
    `trust_remote_code` may run them.

    Args:
        model: vLLM's ModelConfig.
        download_dir: vLLM's, in place of Hugging Face's cache.

    Raises:
        NamespaceError: one of them cannot be read.
    """
    trusted = bool(getattr(model, "trust_remote_code", False))
    patterns = ["*process*.json"]
    if getattr(model, "multimodal_config", None) or getattr(model, "quantization", None):
        patterns.append("*.json")
    if trusted:
        patterns.append("*.py")
    found: dict[str, Any] = {}
    for folder in _folders(model, download_dir):
        for path in sorted({path for pattern in patterns for path in folder.rglob(pattern)}):
            relative = path.relative_to(folder)
            name = relative.as_posix()
            if any(part.startswith(".") or part == "original" for part in relative.parts[:-1]):
                continue  # no model reads them
            left_out = any(fnmatch(name, pattern) for pattern in LEFT_OUT)
            if name not in found and not left_out and path.is_file():
                found[name] = _content(path, trusted=trusted)
    return found


def content_of(path: str, name: str) -> str:
    """The content of a file that a setting names, as its SHA-256.

    Raises:
        NamespaceError: it cannot be read.
    """
    return digest_of(_bytes_of(Path(path), name))


def _content(path: Path, *, trusted: bool) -> Any:
    """The file's content; where remote code is trusted, with the classes that it names."""
    data = _bytes_of(path, path.name)
    left_out = _NOT_CONTENT - {"auto_map"} if trusted else _NOT_CONTENT
    if path.suffix == ".json":
        try:
            return shortened(without(plain(json.loads(data), path.name), left_out))
        except (ValueError, RecursionError):  # no JSON, or nested too deep
            pass
    return digest_of(data)


def _bytes_of(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NamespaceError(
            f"{name}={str(path)!r} cannot be read ({error.strerror}), and secondary_tiers must "
            "know what it says: make it readable for every worker"
        ) from error


def _folders(model: Any, download_dir: str | None) -> Iterator[Path]:
    """Where this host has the checkpoint's small files.

    Processors are downloaded into Hugging Face's cache even where weights are not.
    """
    root = Path(model.model)
    if root.exists():
        yield root if root.is_dir() else root.parent
        return
    for cache in dict.fromkeys((None, download_dir)):
        try:
            found = snapshot_download(
                model.model, revision=model.revision, cache_dir=cache, local_files_only=True
            )
        except Exception:  # the library raises many kinds; there is none here
            continue
        yield Path(found)
