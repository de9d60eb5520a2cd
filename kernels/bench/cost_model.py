"""A model, and no measurement: what a copy of every fragment by itself costs.

The fragments are counted in real plans. The costs are those of vLLM's blog on its KV offloading
connector, of an H100 (DESIGN section 4 quotes them): about 0.5 us of CPU per descriptor; 8 KiB
fragments at 12 to 15 GB/s, 128 KiB at 54 GB/s. The time of a fragment is its descriptor's and that
of its bytes, whose rate follows from the speed at 128 KiB; at 8 KiB this gives 13 GB/s, inside the
published range.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kvstrata.kernels.models import Model, rank_caches
from kvstrata.kernels.transport import Fragments

DESCRIPTOR_S = 0.5e-6
LINK_GBS = 54.0  # no fragment is faster
_KNOWN_BYTES = 128 << 10  # the size that reaches it
_BYTES_PER_S = _KNOWN_BYTES / (_KNOWN_BYTES / (LINK_GBS * 1e9) - DESCRIPTOR_S)


class Prediction(NamedTuple):
    """One number of the model; it is no `Figure`, so no file of measurements takes it."""

    case: str
    metric: str
    value: float
    unit: str


class Pieces(NamedTuple):
    """What a plan cuts the pages of one rank into.

    fragments: per page, of all groups together. nbytes: of these pages.
    """

    fragments: int
    nbytes: int

    @property
    def mean_bytes(self) -> float:
        """Size of a fragment."""
        return self.nbytes / self.fragments


def speed(fragment_bytes: float) -> float:
    """GB/s of a batch of fragments of this size."""
    seconds = DESCRIPTOR_S + fragment_bytes / _BYTES_PER_S
    return min(LINK_GBS, fragment_bytes / seconds / 1e9)


def pieces(model: Model, layout: str, per_chunk: int) -> Pieces:
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
    return Pieces(fragments, nbytes)


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
                yield Prediction(case, "model: speed", speed(found.mean_bytes), "GB/s")
                descriptors = (1 << 30) / found.mean_bytes
                cpu_ms = descriptors * DESCRIPTOR_S * 1e3
                yield Prediction(case, "model: CPU submit", cpu_ms, "ms/GiB")
