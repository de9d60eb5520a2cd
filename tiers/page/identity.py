"""What a page is called on every medium: its key, and the digest of its namespace."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from typing import Any

# A shorter hash could not fill the <hhh>/<hh> of a path; a longer one is no hash that vLLM makes,
# and a file's name must stay under the 255 bytes that file systems allow.
MIN_HASH_BYTES, MAX_HASH_BYTES = 3, 64
MAX_CONFIG_BYTES = 2**20  # of config.json
CONFIG_NAME = "config.json"
DISTRUST_NAME = "distrusted.json"  # beside it, where pages were found that are not the model's

_MAX_MODEL_CHARS = 128


def is_key(key: bytes) -> bool:
    """Whether `key` is a hash of a usable length followed by a 4-byte group index."""
    return MIN_HASH_BYTES <= len(key) - 4 <= MAX_HASH_BYTES


def canonical_json(value: object) -> str:
    """JSON with sorted keys, no spaces, ASCII only: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def namespace_digest(fields: Mapping[str, Any]) -> str:
    """The first 12 hex digits of SHA-256 over the fields as canonical JSON."""
    return hashlib.sha256(canonical_json(dict(fields)).encode()).hexdigest()[:12]


def directory_name(model: str, digest: str) -> str:
    """`<model>_<digest>`: the model's name with every foreign character replaced by `_`."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", model).replace("..", "__")
    return f"{safe[:_MAX_MODEL_CHARS]}_{digest}"


def config_text(fields: Mapping[str, Any]) -> str:
    """What config.json says, for people: ASCII, indented, in the order of names."""
    return json.dumps(dict(fields), indent=2, sort_keys=True, allow_nan=False) + "\n"


def distrust_text() -> str:
    """What distrusted.json says, for people."""
    return config_text(
        {
            "reason": "audits found pages that are not what the model computes",
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "host": os.uname().nodename,
            "process": os.getpid(),
        }
    )
