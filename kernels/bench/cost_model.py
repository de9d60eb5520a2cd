"""A model, and no measurement: what a copy of every fragment by itself costs.

The fragments are counted in real plans. The costs of stores are those of vLLM's blog on its KV
offloading connector, of an H100: about 0.5 us of CPU per descriptor; 8 KiB fragments at 12 to 15
GB/s, 128 KiB at 54 GB/s. The time of a fragment is its descriptor's and that of its bytes, whose
rate follows from the speed at 128 KiB; at 8 KiB this gives 13 GB/s, inside the published range.

Loads by `cuMemcpyBatchAsync` are slower, as vLLM's #42212 found on an H100: 4 to 7 GB/s for 4 to 24
KiB, 40 to 44 at 28 KiB, 51 at 64 KiB. So stock loads fragments below 28 KiB by a kernel on 12
multiprocessors; of its speed nothing is published but that it is near its peak at 8 to 32 KiB, and
the link's speed is what it cannot pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kvstrata.kernels.bench.models import Model, rank_caches
from kvstrata.kernels.gpu.transport import Fragments

DESCRIPTOR_S = 0.5e-6
LINK_GBS = 54.0  # no fragment is faster
_KNOWN_BYTES = 128 << 10  # the size that reaches it
# Loads: (bytes of a fragment, GB/s), joined by straight lines; the first one's time is the least.
_LOADS = ((4 << 10, 4.0), (24 << 10, 7.0), (28 << 10, 42.0), (64 << 10, 51.0), (_KNOWN_BYTES, 54.0))
STOCK_KERNEL_BYTES = 28 << 10  # fragments below are loaded by stock's kernel
_BYTES_PER_S = _KNOWN_BYTES / (_KNOWN_BYTES / (LINK_GBS * 1e9) - DESCRIPTOR_S)


class Prediction(NamedTuple):
    """One number of the model; it is no `Figure`, so no file of measurements takes it."""

    case: str
    metric: str
    value: float
    unit: str


class Fragmentation(NamedTuple):
    """What a plan cuts the pages of one rank into.

    fragments: per page, of all groups together. nbytes: of these pages.
    """

    fragments: int
    nbytes: int

    @property
    def mean_bytes(self) -> float:
        """Size of a fragment."""
        return self.nbytes / self.fragments


def store_speed(fragment_bytes: float) -> float:
    """GB/s of a batch of fragments of this size, from the GPU."""
    seconds = DESCRIPTOR_S + fragment_bytes / _BYTES_PER_S
    return min(LINK_GBS, fragment_bytes / seconds / 1e9)


def load_speed(fragment_bytes: float) -> float:
    """GB/s of a batch of fragments of this size, to the GPU."""
    sizes, speeds = zip(*_LOADS, strict=True)
    return min(1.0, fragment_bytes / sizes[0]) * float(np.interp(fragment_bytes, sizes, speeds))


def stock_load_speed(fragment_bytes: float) -> float:
    """GB/s that stock's loads of fragments of this size do not pass."""
    return LINK_GBS if fragment_bytes < STOCK_KERNEL_BYTES else load_speed(fragment_bytes)


SPEEDS = {
    "store speed": store_speed,
    "load speed": load_speed,
    "load as stock, at most": stock_load_speed,
}


def pieces(model: Model, layout: str, per_chunk: int) -> Fragmentation:
    """The fragments of a model's caches in a layout."""
    fragments = nbytes = 0
    for group in model.groups:
        # more blocks than a page has, or layers that lie apart would look like neighbours
        segments = rank_caches(
            group, layout, num_blocks=2 * per_chunk, blocks_per_chunk=per_chunk, tp=model.tp
        )
        for segment in segments:
            fragments += per_chunk * Fragments(segment, segment.in_page).per_block
            nbytes += segment.shard_bytes
    return Fragmentation(fragments, nbytes)


def predict(
    models: Sequence[Model], layouts: Sequence[str], per_chunks: Sequence[int]
) -> Iterator[Prediction]:
    """Speed and CPU time of a copy of every fragment by itself."""
    for model in models:
        for layout in layouts:
            for per_chunk in per_chunks:
                found = pieces(model, layout, per_chunk)
                case = (
                    f"{model.name}, {layout}, chunks of {per_chunk}, "
                    f"{found.fragments} fragments of {found.mean_bytes:.0f} B per page"
                )
                for metric, speed in SPEEDS.items():
                    yield Prediction(case, f"model: {metric}", speed(found.mean_bytes), "GB/s")
                descriptors = (1 << 30) / found.mean_bytes
                cpu_ms = descriptors * DESCRIPTOR_S * 1e3
                yield Prediction(case, "model: CPU submit", cpu_ms, "ms/GiB")
