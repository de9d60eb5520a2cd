"""The plan of a copy: which bytes of the KV caches go where in a page, for one worker."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd
from typing import NamedTuple

import torch

from kvstrata.kernels.geometry import (
    GeometryError,
    LayerCache,
    LayerShape,
    SegmentShape,
    segment_shapes,
)
from kvstrata.kernels.runs import CacheRuns, cache_runs, runs_at


@dataclass(frozen=True)
class LocalLayer:
    """A layer's cache and the heads it holds.

    first_head: index, over all ranks, of the cache's first head (the rank, for opaque content).
    replicas: workers that hold the same bytes; they share the writing.
    replica: this worker's number among them; it stores slot s when `s % replicas == replica`.
    """

    cache: LayerCache
    first_head: int
    replicas: int = 1
    replica: int = 0


class RowLayout(NamedTuple):
    """Where one worker's shard of a segment lies in a row of pages.

    offset: bytes from the row's start to the first local head's first local layer.
    head_pitch: bytes from one head to the next.
    """

    offset: int
    head_pitch: int


@dataclass(frozen=True)
class Shard:
    """The bytes of a page that one worker owns: `count` runs of `length` bytes, `pitch` apart."""

    offset: int
    length: int
    pitch: int
    count: int


@dataclass(frozen=True)
class LayerSet:
    """Local layers of one segment whose caches have equal strides: one kernel launch.

    positions: places of the layers among the segment's local layers.
    views: their normal forms, uint8 `[B * kernel_blocks, H, N, P, E]`.
    table: int64 `[layers, 2]` on the caches' device: address of the cache, and bytes from the
        start of a head in the page to this layer.
    rows, planes, plane_bytes: N, P, E after joining axes that are one run.
    strides: bytes between blocks, heads, rows, planes.
    """

    positions: tuple[int, ...]
    views: tuple[torch.Tensor, ...]
    table: torch.Tensor
    kernel_blocks: int
    rows: int
    planes: int
    plane_bytes: int
    strides: tuple[int, int, int, int]

    @cached_property
    def runs(self) -> CacheRuns:
        """The caches, which lie in CPU memory, in runs of `plane_bytes`."""
        blocks, heads, *_ = self.views[0].shape
        shape = (blocks, heads, self.rows, self.planes)
        return cache_runs(
            [runs_at(v.data_ptr(), self.plane_bytes, shape, self.strides) for v in self.views]
        )


@dataclass(frozen=True)
class Segment:
    """One worker's shard of one segment of a page.

    heads, layers: extents of the whole segment; local_* are the worker's runs, from first_*.
    blocks_per_chunk, num_blocks: blocks of a page, blocks of the caches.
    block_bytes: bytes of one (head, layer, block).
    page_offset: bytes from the page's start to the segment.
    replicas, replica: see `LocalLayer`.
    word_bytes: 16, 8, 4, 2 or 1; divides every address and stride that the copy uses.
    """

    names: tuple[str, ...]
    device: torch.device
    heads: int
    first_head: int
    local_heads: int
    layers: int
    first_layer: int
    local_layers: int
    blocks_per_chunk: int
    num_blocks: int
    block_bytes: int
    page_offset: int
    replicas: int
    replica: int
    word_bytes: int
    sets: tuple[LayerSet, ...]

    @property
    def slab_bytes(self) -> int:
        """Bytes of one head in one layer."""
        return self.blocks_per_chunk * self.block_bytes

    @property
    def head_bytes(self) -> int:
        """Bytes of one head in all layers of the segment."""
        return self.layers * self.slab_bytes

    @property
    def shard_bytes(self) -> int:
        """Bytes of a page that this worker owns in this segment."""
        return self.local_heads * self.local_layers * self.slab_bytes

    @property
    def in_page(self) -> RowLayout:
        """The place of this worker's shard in a page."""
        skipped = self.first_head * self.head_bytes + self.first_layer * self.slab_bytes
        return RowLayout(self.page_offset + skipped, self.head_bytes)

    def packed(self, offset: int) -> RowLayout:
        """The place of this worker's shard alone, without gaps, `offset` bytes into a row."""
        return RowLayout(offset, self.local_layers * self.slab_bytes)

    @property
    def shard(self) -> Shard:
        """The page ranges of the shard; one range unless pipeline parallelism splits the layers."""
        offset, pitch = self.in_page
        if self.local_layers == self.layers:
            return Shard(offset, self.shard_bytes, self.shard_bytes, 1)
        return Shard(offset, self.local_layers * self.slab_bytes, pitch, self.local_heads)


def plan(
    layers: Sequence[LayerShape], local: Mapping[str, LocalLayer], blocks_per_chunk: int
) -> tuple[Segment, ...]:
    """This worker's shard of every segment of a group's page.

    layers: all layers of the group over all ranks, in page order; equal on every rank.
    local: the layers that this worker holds, by name.
    A segment of which the worker holds no layer is left out.
    Raises GeometryError when a cache contradicts its layer, or when the worker's layers of one
    segment are not neighbours or differ in heads, replicas, blocks or device.
    """
    by_name = {layer.name: layer for layer in layers}
    unknown = sorted(local.keys() - by_name.keys())
    if unknown:
        raise GeometryError(f"layer {unknown[0]} is not among the group's layers")
    segments = []
    for shape in segment_shapes(layers, blocks_per_chunk):
        positions = [i for i, name in enumerate(shape.layers) if name in local]
        if positions:
            kind = by_name[shape.layers[0]]
            segments.append(_segment(shape, kind, positions, local, blocks_per_chunk))
    return tuple(segments)


def split(segment: Segment, most_bytes: int) -> tuple[Segment, ...]:
    """The segment as subshards: segments whose shards take at most `most_bytes`, each to be copied
    alone.

    Heads are split first, since a range of them is one range of the page; where one head is too
    large, its layers. One layer of one head is never split: that may be larger.
    """
    slab, per_head = segment.slab_bytes, segment.local_layers * segment.slab_bytes
    heads = min(segment.local_heads, max(1, most_bytes // per_head))
    layers = segment.local_layers if per_head <= most_bytes else max(1, most_bytes // slab)
    return tuple(
        _subshard(segment, h, min(heads, segment.local_heads - h), i, i + layers)
        for h in range(0, segment.local_heads, heads)
        for i in range(0, segment.local_layers, layers)
    )


def _subshard(
    segment: Segment, first_head: int, heads: int, first_layer: int, stop_layer: int
) -> Segment:
    """The local heads and layers in these ranges."""
    sets = []
    for layers in segment.sets:
        mine = [i for i, at in enumerate(layers.positions) if first_layer <= at < stop_layer]
        if mine:
            positions = tuple(layers.positions[i] - first_layer for i in mine)
            skipped = torch.tensor(
                [first_head * layers.strides[1], -first_layer * segment.slab_bytes]
            )
            table = persistent(layers.table[mine].cpu() + skipped, layers.table.device)
            views = tuple(layers.views[i].narrow(1, first_head, heads) for i in mine)
            sets.append(replace(layers, positions=positions, views=views, table=table))
    names = segment.names[first_layer:stop_layer]
    return replace(
        segment,
        names=names,
        first_head=segment.first_head + first_head,
        local_heads=heads,
        first_layer=segment.first_layer + first_layer,
        local_layers=len(names),
        sets=tuple(sets),
    )


def _segment(
    shape: SegmentShape,
    kind: LayerShape,
    positions: list[int],
    local: Mapping[str, LocalLayer],
    blocks_per_chunk: int,
) -> Segment:
    names = tuple(shape.layers[i] for i in positions)
    if positions[-1] - positions[0] + 1 != len(positions):
        raise GeometryError(f"layers {names[0]} to {names[-1]} of one worker are not neighbours")
    first = local[names[0]]
    for name in names:
        _check_layer(kind, local[name], first, name)
    slab_bytes = blocks_per_chunk * kind.block_bytes
    sets = _layer_sets([local[name].cache for name in names], slab_bytes)
    view = first.cache.view
    return Segment(
        names=names,
        device=view.device,
        heads=kind.heads,
        first_head=first.first_head,
        local_heads=view.shape[1],
        layers=len(shape.layers),
        first_layer=positions[0],
        local_layers=len(positions),
        blocks_per_chunk=blocks_per_chunk,
        num_blocks=first.cache.num_blocks,
        block_bytes=kind.block_bytes,
        page_offset=shape.offset,
        replicas=first.replicas,
        replica=first.replica,
        word_bytes=_word_bytes(sets, shape.offset),
        sets=sets,
    )


def _check_layer(kind: LayerShape, layer: LocalLayer, first: LocalLayer, name: str) -> None:
    cache = layer.cache
    found = cache.shape(kind.heads)
    for field in ("content", "dtype", "tokens", "width"):
        ours, theirs = getattr(found, field), getattr(kind, field)
        if ours != theirs:
            raise GeometryError(f"layer {name}: {field} is {ours} here but {theirs} in the page")
    heads = cache.view.shape[1]
    if not 0 <= layer.first_head <= kind.heads - heads:
        raise GeometryError(
            f"layer {name}: {heads} heads from {layer.first_head} do not fit into {kind.heads}"
        )
    if not 0 <= layer.replica < layer.replicas:
        raise GeometryError(f"layer {name}: replica {layer.replica} of {layer.replicas}")
    for what, ours, theirs in (
        ("heads", heads, first.cache.view.shape[1]),
        ("first head", layer.first_head, first.first_head),
        ("replica", (layer.replica, layer.replicas), (first.replica, first.replicas)),
        ("number of blocks", cache.num_blocks, first.cache.num_blocks),
        ("device", cache.view.device, first.cache.view.device),
    ):
        if ours != theirs:
            raise GeometryError(
                f"layer {name}: {what} is {ours} but {theirs} in layer {first.cache.name}"
            )


def _layer_sets(caches: list[LayerCache], slab_bytes: int) -> tuple[LayerSet, ...]:
    alike: dict[tuple[int, tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for position, cache in enumerate(caches):
        view = cache.view
        key = (cache.kernel_blocks, tuple(view.shape), tuple(view.stride()))
        alike.setdefault(key, []).append(position)
    sets = []
    for (kernel_blocks, shape, stride), positions in alike.items():
        views = tuple(caches[i].view for i in positions)
        table = [(v.data_ptr(), i * slab_bytes) for v, i in zip(views, positions, strict=True)]
        _, _, rows, planes, plane_bytes = shape
        block_stride, head_stride, row_stride, plane_stride, _ = stride
        if planes == 1 or plane_stride == plane_bytes:
            planes, plane_bytes, plane_stride = 1, planes * plane_bytes, 0
        if planes == 1 and (rows == 1 or row_stride == plane_bytes):
            rows, plane_bytes, row_stride = 1, rows * plane_bytes, 0
        sets.append(
            LayerSet(
                positions=tuple(positions),
                views=views,
                table=persistent(torch.tensor(table, dtype=torch.int64), views[0].device),
                kernel_blocks=kernel_blocks,
                rows=rows,
                planes=planes,
                plane_bytes=plane_bytes,
                strides=(block_stride, head_stride, row_stride, plane_stride),
            )
        )
    return tuple(sets)


def _word_bytes(sets: tuple[LayerSet, ...], page_offset: int) -> int:
    word = gcd(16, page_offset)
    for layers in sets:
        word = gcd(word, layers.plane_bytes, *layers.strides)
        for view in layers.views:
            word = gcd(word, view.data_ptr(), view.storage_offset())
    return word


def persistent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`, in memory that stays while vLLM sleeps.

    vLLM registers KV caches inside its sleep-mode memory pool, whose memory it takes away later.
    Pools apply to the thread that entered them; a thread of our own is outside.
    """

    def move() -> torch.Tensor:
        moved = tensor.to(device)
        if moved.is_cuda:
            torch.cuda.current_stream(device).synchronize()  # any stream may read it
        return moved

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(move).result()
