"""Who is measured: the pipeline with each of its transports, torch's own copies, stock vLLM.

A per-fragment batch is the pipeline's direct transport: one descriptor of `cuMemcpyBatchAsync` for
each contiguous piece, which is how stock vLLM stores its blocks and loads large ones; small ones it
loads by a kernel (`fragment_kernel`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from types import SimpleNamespace
from typing import Any

import torch

from kvstrata.kernels.bench import fragment_kernel
from kvstrata.kernels.bench.results.cases import (
    AS_STOCK,
    INDEXED,
    OURS,
    PER_FRAGMENT,
    STAGED,
    STOCK,
    ZERO_COPY,
)
from kvstrata.kernels.bench.scene import Contestant, Scene, shard_of
from kvstrata.kernels.gpu.device import CudaDevice, Pieces, cuda
from kvstrata.kernels.gpu.pipeline import GpuPipeline
from kvstrata.kernels.gpu.transport import Transport
from kvstrata.kernels.pack import prepare_triton
from kvstrata.kernels.pipeline import GroupWork, Pipeline
from kvstrata.kernels.plan import Segment

_TRANSPORTS = {
    OURS: None,
    STAGED: Transport.STAGED,
    PER_FRAGMENT: Transport.DIRECT,
    ZERO_COPY: Transport.ZERO_COPY,
}


class PinnedBefore(CudaDevice):
    """A device of several pipelines on one region, which can be pinned only once."""

    def pin(self, region: torch.Tensor) -> None:
        """Nothing: the benchmark did, and undoes it."""


class Piped:
    """A pipeline."""

    def __init__(self, name: str, pipeline: Pipeline) -> None:
        self.name, self.pipeline = name, pipeline
        self.per_fragment = name == PER_FRAGMENT
        self.under_way: set[int] = set()
        self._numbers = count()

    def submit(
        self, stores: Sequence[GroupWork], loads: Sequence[GroupWork], expedited: bool = False
    ) -> None:
        """See `Contestant`."""
        if stores:
            self.pipeline.submit_store(self._next(), stores)
        if loads:
            self.pipeline.submit_load(self._next(), loads, expedited)

    def wait(self) -> None:
        """See `Contestant`."""
        self.pipeline.wait(self.under_way)
        self.reap()

    def reap(self) -> int:
        """Forget what is done, and tell its bytes."""
        done = self.pipeline.finished()
        self.under_way.difference_update(job.job_id for job in done)
        return sum(job.nbytes for job in done)

    def close(self) -> None:
        """See `Contestant`."""
        self.pipeline.shutdown()

    def _next(self) -> int:
        number = next(self._numbers)
        self.under_way.add(number)
        return number


class _Streams:
    """A stream for each direction, behind what the current stream does so far."""

    def __init__(self, device: torch.device) -> None:
        self._streams = [cuda.Stream(device) for _ in range(2)]

    def get(self, *, store: bool) -> Any:
        """The stream of a direction."""
        stream = self._streams[store]
        stream.wait_stream(cuda.current_stream())
        return stream

    def wait(self) -> None:
        """Return when both are done."""
        for stream in self._streams:
            stream.synchronize()


class Indexed:
    """torch alone: gather the blocks on the device, and copy page by page."""

    name, per_fragment = INDEXED, False

    def __init__(self, scene: Scene) -> None:
        self._scene, self._streams = scene, _Streams(scene.device)
        most = max(
            scene.most_pages * segment.shard_bytes
            for segments in scene.groups.values()
            for segment in segments
        )
        self._staging = [torch.empty(most, dtype=torch.uint8, device=scene.device) for _ in "sl"]

    def submit(self, stores: Sequence[GroupWork], loads: Sequence[GroupWork]) -> None:
        """See `Contestant`."""
        for store, works in ((True, stores), (False, loads)):
            with cuda.stream(self._streams.get(store=store)):
                for number, slots, block_ids in works:
                    ids = torch.from_numpy(block_ids).to(self._scene.device, non_blocking=True)
                    for segment in self._scene.groups[number]:
                        self._move(segment, slots.tolist(), ids, store=store)

    def _move(self, segment: Segment, slots: list[int], ids: torch.Tensor, *, store: bool) -> None:
        staged = self._staging[store][: len(slots) * segment.shard_bytes].view(len(slots), -1)
        pages = self._scene.region[:, shard_of(segment)]
        if store:
            gather(segment, ids, staged)
            for slot, shard in zip(slots, staged.unbind(), strict=True):
                pages[slot].copy_(shard, non_blocking=True)
        else:
            for slot, shard in zip(slots, staged.unbind(), strict=True):
                shard.copy_(pages[slot], non_blocking=True)
            scatter(segment, ids, staged)

    def wait(self) -> None:
        """See `Contestant`."""
        self._streams.wait()

    def close(self) -> None:
        """See `Contestant`."""
        self.wait()


def gather(segment: Segment, ids: torch.Tensor, staged: torch.Tensor) -> None:
    """Blocks to shards. ids: int64 [n, blocks_per_chunk]. staged: uint8 [n, shard bytes]."""
    for view, there in _layers(segment, ids, staged):
        picked = view.index_select(0, ids.flatten())
        there.copy_(picked.view(*ids.shape, segment.local_heads, -1).transpose(1, 2))


def scatter(segment: Segment, ids: torch.Tensor, staged: torch.Tensor) -> None:
    """Shards to blocks; the same arguments."""
    for view, there in _layers(segment, ids, staged):
        blocks = there.transpose(1, 2).reshape(ids.numel(), *view.shape[1:])
        view.index_copy_(0, ids.flatten(), blocks)


def _layers(
    segment: Segment, ids: torch.Tensor, staged: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each layer's cache and its place in the shards, int64 [n, H, blocks_per_chunk, words]."""
    (layers,) = segment.sets  # all alike, and no kernel blocks: the models' caches are
    pages, blocks = ids.shape
    words = staged.view(torch.int64).view(
        pages, segment.local_heads, segment.local_layers, blocks, -1
    )
    return [
        (view.view(torch.int64), words[:, :, position])
        for position, view in zip(layers.positions, layers.views, strict=True)
    ]


class _Fragmented:
    """Who copies each fragment of the pages by itself, in a stream for each direction."""

    per_fragment = True

    def __init__(self, scene: Scene) -> None:
        self._scene, self._streams = scene, _Streams(scene.device)

    def submit(self, stores: Sequence[GroupWork], loads: Sequence[GroupWork]) -> None:
        """See `Contestant`."""
        region = self._scene.region
        for store, works in ((True, stores), (False, loads)):
            stream = self._streams.get(store=store)
            with cuda.stream(stream):
                for number, slots, ids in works:
                    pages = region.data_ptr() + slots * region.stride(0)
                    for fragments in self._scene.fragments[number]:
                        self._copy(fragments.pieces(pages, ids, None), stream, store=store)

    def _copy(self, pieces: Pieces, stream: Any, *, store: bool) -> None:
        raise NotImplementedError

    def wait(self) -> None:
        """See `Contestant`."""
        self._streams.wait()

    def close(self) -> None:
        """See `Contestant`."""
        self.wait()


class AsStock(_Fragmented):
    """What stock vLLM does with these fragments, where none is installed."""

    name = AS_STOCK

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        self._device = PinnedBefore(scene.device)

    def _copy(self, pieces: Pieces, stream: Any, *, store: bool) -> None:
        if not store and fragment_kernel.takes(pieces):
            fragment_kernel.load(pieces, self._scene.device)
        else:
            self._device.copy(stream, pieces, to_host=store)


class Stock(_Fragmented):
    """The functions by which vLLM's CPU offloading copies, given the fragments of our pages."""

    name = STOCK

    def __init__(self, scene: Scene) -> None:
        super().__init__(scene)
        from vllm.v1.kv_offload.cpu import gpu_worker

        worker: Any = gpu_worker
        sizes = [
            [SimpleNamespace(page_size_bytes=fragments.most_bytes) for fragments in some]
            for some in scene.fragments.values()
        ]
        self._move = {store: worker._select_swap_blocks_fn(sizes, store) for store in (False, True)}

    def _copy(self, pieces: Pieces, stream: Any, *, store: bool) -> None:
        device, host, sizes = map(torch.from_numpy, pieces)
        ends = (device, host) if store else (host, device)
        self._move[store](*ends, sizes, is_src_access_order_any=not store)


def contestants(scene: Scene) -> list[Contestant]:
    """All of them, ours first, stock where it is installed."""
    device = PinnedBefore(scene.device)
    found: list[Contestant] = [
        Piped(name, GpuPipeline(scene.groups, scene.region, device, prepare_triton, transport))
        for name, transport in _TRANSPORTS.items()
    ]
    found += [Indexed(scene), AsStock(scene)]
    if has_stock():
        found.append(Stock(scene))
    return found


def has_stock() -> bool:
    """Whether a vLLM is installed whose copy functions are where `Stock` looks for them."""
    try:
        from vllm.v1.kv_offload.cpu import gpu_worker
    except ImportError:
        return False
    return hasattr(gpu_worker, "_select_swap_blocks_fn")
