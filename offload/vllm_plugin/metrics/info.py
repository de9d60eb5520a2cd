"""Who speaks: the labels of `kvstrata_info`."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kvstrata.tiers.page.identity import namespace_digest

# Hex digits of a mark of the seed: enough to tell two servers' apart, and too few to find a seed
# by, which would help who looks for prompts with the same hash.
_MARK = 4


def info_labels(namespace: Mapping[str, Any]) -> tuple[str, str, str]:
    """Version, digest of the namespace, and hashing; the last two are empty without a namespace.

    Hashing is the algorithm, and a mark of the seed.
    """
    try:
        release = version("kvstrata")
    except PackageNotFoundError:  # imported from where it was not installed
        release = "unknown"
    if not namespace:
        return release, "", ""
    algorithm, seed = namespace["hash_algorithm"], namespace["hash_seed"]
    mark = sha256(repr(seed).encode()).hexdigest()[:_MARK]
    return release, namespace_digest(namespace), f"{algorithm}/{mark}"
