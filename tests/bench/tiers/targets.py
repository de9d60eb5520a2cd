"""What the figures are held against."""

from __future__ import annotations

from kvstrata.kernels.bench.results.targets import Target, of
from tests.bench.fs.figures import Figure
from tests.bench.tiers.contestants import Ours, Raw

# A pool's page is copied and verified, and memory is as fast as nothing else: the copy alone is
# what it is held against.
_LEAST = {"fs": 0.9, "pool": 0.7, "pool-huge": 0.7, "object": 0.9, "valkey": 0.9, "mooncake": 0.9}


def _of(name: str, figure: Figure) -> bool:
    return figure.operation.startswith(f"{name}: ") and figure.page_bytes >= 512 * 1024


def _target(name: str, least: float) -> Target:
    applies = of("GB/s", lambda figure: _of(name, figure))
    return Target(f"{name}, against its client", Ours.name, applies, least, (Raw.name,))


TARGETS = tuple(_target(name, least) for name, least in _LEAST.items())
