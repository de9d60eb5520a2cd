"""Values of a configuration as plain JSON, equal text for equal values in every process."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from kvstrata.offload.vllm_plugin.engine.errors import NamespaceError
from kvstrata.tiers.page.identity import canonical_json

# Bytes of JSON text from which on a value is written as its SHA-256: a quantisation may list every
# expert of every layer, and config.json and the region's header take 1 MiB each.
_MAX_VALUE_BYTES = 1 << 16
_MAX_DEPTH = 20  # of nested values; config.json takes 32 levels, some of them above these


def plain(value: Any, name: str, depth: int = _MAX_DEPTH) -> Any:
    """`value` as None, bool, int, finite float, str, list or dict of these.

    Args:
        value: a setting.
        name: its dotted path, for the error.
        depth: levels of nesting that are left.

    Raises:
        NamespaceError: the value has no text that is the same in every process; names it.
    """
    if depth == 0:
        raise NamespaceError(f"{name} is nested too deep to be part of a namespace")
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Path | torch.dtype):
        return str(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, np.generic):
        return plain(value.item(), name, depth)
    if isinstance(value, np.ndarray | torch.Tensor):
        return plain(value.tolist(), name, depth)
    if isinstance(value, Mapping):
        return _mapping(value, name, depth)
    if isinstance(value, list | tuple):
        return [plain(item, f"{name}[{i}]", depth - 1) for i, item in enumerate(value)]
    if isinstance(value, set | frozenset):
        return sorted((plain(item, name, depth - 1) for item in value), key=canonical_json)
    if isinstance(value, type | FunctionType) and "<" not in value.__qualname__:
        return f"{value.__module__}.{value.__qualname__}"
    # Before dataclasses: Transformers' configurations are some, and have more than their fields.
    if not isinstance(value, type) and callable(getattr(value, "to_dict", None)):
        return _mapping(value.to_dict(), name, depth)
    if is_dataclass(value) and not isinstance(value, type):
        inner = {field.name: getattr(value, field.name) for field in fields(value)}
        return _mapping(inner, name, depth)
    if isinstance(value, SimpleNamespace):
        return _mapping(vars(value), name, depth)
    raise NamespaceError(
        f"{name} is a {type(value).__module__}.{type(value).__qualname__}, which has no text that "
        "is the same in every process, so secondary_tiers cannot tell whether two engines agree "
        "on it: set it to plain values (numbers, text, lists, dictionaries), or leave out "
        "secondary_tiers"
    )


def _mapping(value: Mapping[Any, Any], name: str, depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        text = str(plain(key, f"a key of {name}", depth - 1))
        if text in found:
            raise NamespaceError(f"{name} has two keys that are written {text!r}")
        found[text] = plain(item, f"{name}.{text}", depth - 1)
    return found


def without(value: Any, keys: Iterable[str]) -> Any:
    """A plain value without these keys, at every depth."""
    if isinstance(value, dict):
        return {key: without(item, keys) for key, item in value.items() if key not in keys}
    if isinstance(value, list):
        return [without(item, keys) for item in value]
    return value


def shortened(value: Any) -> Any:
    """A plain value in which what is longer than 64 KiB of JSON is a digest."""
    text = canonical_json(value)
    if len(text) <= _MAX_VALUE_BYTES:
        return value
    if isinstance(value, dict):
        value = {key: shortened(item) for key, item in value.items()}
        if len(canonical_json(value)) <= _MAX_VALUE_BYTES:
            return value
    return digest_of(text.encode())


def digest_of(content: bytes) -> str:
    """How content appears that is too long for a namespace or no text."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
