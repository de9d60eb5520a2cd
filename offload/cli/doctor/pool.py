"""Would a pool work here? Looked at without making it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvstrata.tiers.options import parse_options
from kvstrata.tiers.pool.config import PoolOptions
from kvstrata.tiers.pool.place import check_fit, check_own, check_shared_memory, pool_path


def check_pool(options: Mapping[str, Any], cpu_bytes: int) -> PoolOptions:
    """Refuse what the pool tier refuses at start, beside a CPU tier of `cpu_bytes`; its options.

    Raises:
        TierConfigError: naming what is wrong.
    """
    given = parse_options(PoolOptions, options, "pool tier")
    check_shared_memory()
    check_own(given.name)
    check_fit(pool_path(given.name), given.max_bytes, cpu_bytes)
    return given
