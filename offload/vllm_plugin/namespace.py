"""The namespace: what two engines must have in common to share pages."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from vllm.config import ModelConfig, VllmConfig
from vllm.v1.kv_offload.config import OffloadingConfig

from kvstrata.kernels.geometry import OPAQUE, LayerShape
from kvstrata.tiers.base import PageLayout, layouts_to_json

logger = logging.getLogger("kvstrata")

FORMAT_VERSION = 1
_MIB = 1 << 20
_SAMPLE_BYTES = 4096
_SAMPLES = 1024
# A safetensors file begins with the size of its JSON header, a little-endian uint64; the
# format's own reader refuses a header of more than 100 MB.
_HEADER_SIZE_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
# Says where a configuration came from or how to print it, not what the model computes.
_NOT_CONTENT = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype"})


class NamespaceError(ValueError):
    """Secondary tiers cannot be used with this engine configuration."""


def namespace_fields(
    config: OffloadingConfig,
    vllm_config: VllmConfig,
    layouts: Mapping[int, PageLayout],
    shapes: Mapping[int, Sequence[LayerShape]],
    orders: Mapping[str, str],
) -> dict[str, Any]:
    """The namespace as JSON-serialisable fields.

    Args:
        config: vLLM's offloading configuration.
        vllm_config: the engine's configuration.
        layouts: page layout by group.
        shapes: the layers of each group over all pipeline stages, in order.
        orders: content-order id by layer name.
    """
    cache = vllm_config.cache_config
    model = vllm_config.model_config
    opaque = any(shape.content == OPAQUE for group in shapes.values() for shape in group)
    blocked = any(order for order in orders.values())
    parallel = config.parallel
    return {
        "format_version": FORMAT_VERSION,
        "weights": weights_fingerprint(model, vllm_config),
        "draft_weights": _draft_fingerprint(vllm_config),
        "text_config": _config_digest(model),
        "kv_dtype": config.model.dtype,
        "tokens_per_hash": config.cache.tokens_per_hash,
        "pages": layouts_to_json(layouts),
        "tokens_per_block": (
            [group.tokens_per_block for group in config.groups] if blocked else None
        ),
        "groups": {
            str(group): {
                "layers": [shape.name for shape in shapes[group]],
                "orders": sorted({orders[shape.name] for shape in shapes[group]}),
            }
            for group in layouts
        },
        "topology": (
            {
                "tp": parallel.tp_size,
                "pp": parallel.pp_size,
                "pcp": parallel.pcp_size,
                "dcp": parallel.dcp_size,
                "layout": str(config.kv_cache_layout),
            }
            if opaque
            else None
        ),
        "codec": "raw",
        "hash_algorithm": cache.prefix_caching_hash_algo,
        "hash_seed": os.environ.get("PYTHONHASHSEED", "vllm-default"),
    }


def check_secondary_tiers(vllm_config: VllmConfig) -> None:
    """Refuse what would give pages names that other processes cannot know.

    Raises:
        NamespaceError: naming the setting and the remedy.
    """
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    if "xxhash" in algorithm and "PYTHONHASHSEED" not in os.environ:
        raise NamespaceError(
            f"prefix_caching_hash_algo={algorithm!r} without PYTHONHASHSEED gives every process "
            "random chunk hashes, so secondary_tiers could never hit: set PYTHONHASHSEED to the "
            "same value in all instances, or use --prefix-caching-hash-algo sha256"
        )


def weights_fixed(configured: bool | None, vllm_config: VllmConfig) -> bool:
    """Whether the weights stay what they are while the engine runs.

    vLLM does not tell connectors of weight updates, so an engine that can receive new
    weights is taken to do so at every cache reset.
    """
    if configured is not None:
        return configured
    return getattr(vllm_config, "weight_transfer_config", None) is None


def weights_fingerprint(model: ModelConfig, vllm_config: VllmConfig) -> str:
    """SHA-256 over the weight files' names, sizes, samples of content, and how they are read.

    The samples of a file are its first and last MiB, and
    - of a safetensors file the header and the middle 4 KiB of each tensor;
    - of any other file 4 KiB at 1024 evenly spaced positions.
    The first design took the first and last MiB alone. A fine-tune that keeps the embeddings
    (or whichever tensors lie at the ends) has the sizes and the ends of its base, so the two
    would have shared pages and answered with each other's attention. Not all bytes are read
    because that costs minutes for a large model.

    Times and paths are left out, so that it is equal on every host and for every TP size.
    A model whose weight files cannot be seen gets a value of its own at every start.
    """
    digest = hashlib.sha256()
    load_format = str(getattr(vllm_config.load_config.load_format, "value", None))
    if load_format == "None":
        load_format = str(vllm_config.load_config.load_format)
    facts = [load_format, str(model.quantization), str(model.dtype)]
    files: list[tuple[str, Path]] = []
    if load_format != "dummy":
        try:
            files = _weight_files(model, vllm_config.load_config.download_dir)
        except FileNotFoundError as error:
            logger.warning(
                "kvstrata cannot tell which weights %s has, so its files in secondary tiers will "
                "not be found after a restart: %s",
                model.model,
                error,
            )
    if not files:
        facts += [str(model.seed), secrets.token_hex(16)]
    digest.update(json.dumps(facts).encode())
    for name, path in files:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{name}\0{size}\0".encode())
            for start, count in _samples(name, file, size):
                file.seek(start)
                digest.update(file.read(count))
    return digest.hexdigest()


def _samples(name: str, file: BinaryIO, size: int) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of what is hashed of a weight file."""
    yield 0, _MIB
    yield max(0, size - _MIB), _MIB
    tensors = None
    if name.endswith(".safetensors"):
        header_end, tensors = _safetensors(file, size)
    if tensors is None:
        room = max(0, size - _SAMPLE_BYTES)
        starts: Iterable[int] = {room * index // (_SAMPLES - 1) for index in range(_SAMPLES)}
        yield from ((start, _SAMPLE_BYTES) for start in sorted(starts))
        return
    yield 0, header_end
    for begin, end in tensors:
        count = min(_SAMPLE_BYTES, end - begin)
        yield begin + (end - begin - count) // 2, count


def _safetensors(file: BinaryIO, size: int) -> tuple[int, list[tuple[int, int]] | None]:
    """Where the header ends, and begin and end of each tensor in the file, in order.

    None in place of the tensors if the header is broken.
    """
    file.seek(0)
    data = _HEADER_SIZE_BYTES + int.from_bytes(file.read(_HEADER_SIZE_BYTES), "little")
    if data > min(size, _MAX_HEADER_BYTES):
        return 0, None
    try:
        header = json.loads(file.read(data - _HEADER_SIZE_BYTES))
        offsets = [
            entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"
        ]
        tensors = sorted((data + begin, data + end) for begin, end in offsets)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return 0, None
    if not all(
        type(begin) is type(end) is int and data <= begin <= end <= size for begin, end in tensors
    ):
        return 0, None
    return data, tensors


def _weight_files(model: ModelConfig, download_dir: str | None) -> list[tuple[str, Path]]:
    """(name inside the model, path) of the weight files on this host, sorted by name.

    Raises:
        FileNotFoundError: there are none; the message says where they were looked for.
    """
    root = Path(model.model)
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        root = _downloaded(model, download_dir)
    for pattern in _WEIGHT_PATTERNS:
        paths = sorted(root.rglob(pattern))
        if paths:
            return [(path.relative_to(root).as_posix(), path) for path in paths]
    raise FileNotFoundError(f"{root} has no {', '.join(_WEIGHT_PATTERNS)}")


def _downloaded(model: ModelConfig, download_dir: str | None) -> Path:
    """Where Hugging Face's cache, or `download_dir`, holds the model."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model.model, revision=model.revision, cache_dir=download_dir, local_files_only=True
            )
        )
    except Exception as error:  # the library raises many kinds
        place = download_dir or "Hugging Face's cache"
        raise FileNotFoundError(f"{place} does not hold the model: {error}") from error


def _draft_fingerprint(vllm_config: VllmConfig) -> str | None:
    speculative = vllm_config.speculative_config
    draft = getattr(speculative, "draft_model_config", None)
    return weights_fingerprint(draft, vllm_config) if draft is not None else None


def _config_digest(model: ModelConfig) -> str:
    fields = {k: v for k, v in model.hf_text_config.to_dict().items() if k not in _NOT_CONTENT}
    text = json.dumps(fields, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
