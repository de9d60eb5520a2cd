"""The bytes of a page, and where one worker's KV caches hold them.

`LayerShape` and `SegmentShape` say what a page contains: plain numbers, the same on every rank.
`LayerCache` is one layer's KV cache on this worker as bytes with strides. `plan.py` joins the two.

Every page is a sequence of segments, and every segment has the byte order
`[heads, layers, blocks per chunk, bytes of one block of one head in one layer]`. Only the meaning
of the last axis depends on the content: for token-major content it is `[N, C]`, so that the
segment reads as `[H, L, tokens per chunk, C]`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch


class GeometryError(ValueError):
    """A KV cache is not what its declared content requires."""


# What the bytes of one block are, hence how a page may be shared between topologies.
TOKEN_MAJOR = "token-major"  # per head, tokens in order, each one run of elements
HEAD_SLABS = "head-slabs"  # per head, bytes in an order that the attention backend chose
OPAQUE = "opaque"  # bytes of one rank, in an order that the attention backend chose

# torch dtype -> name in a safetensors header
DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
# (kvstrata.tiers.base has a table of its own: neither folder imports the other.)
DTYPE_BYTES: Mapping[str, int] = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class LayerShape:
    """What one layer puts into a page, over all tensor-parallel ranks; plain JSON values.

    name: the layer's name in vLLM.
    content: TOKEN_MAJOR, HEAD_SLABS or OPAQUE.
    dtype: safetensors name of the element type; "U8" for head slabs and opaque bytes.
    heads: KV heads over all ranks; for opaque content the number of ranks.
    tokens: tokens per block for token-major content, else 1.
    width: elements of one token in one head (token-major), bytes of one head's slab of one block
        (head slabs), bytes per block (opaque).
    """

    name: str
    content: str
    dtype: str
    heads: int
    tokens: int
    width: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one head (of one rank, for opaque content)."""
        return self.tokens * self.width * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class SegmentShape:
    """One tensor of the page: the group's layers that are equal in everything but the name.

    dtype: safetensors name of the element type.
    shape: `[H, L, blocks_per_chunk * N, C]` for token-major content,
        `[H, L, blocks_per_chunk, slab bytes]` for head slabs,
        `[ranks, L * blocks_per_chunk * block bytes]` for opaque content.
    layers: the layers' names in the order of axis L.
    offset, nbytes: where the segment lies in the page, in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    layers: tuple[str, ...]
    offset: int
    nbytes: int


def segment_shapes(layers: Sequence[LayerShape], blocks_per_chunk: int) -> tuple[SegmentShape, ...]:
    """The segments of a page, in layer order of first appearance, without gaps between them.

    Raises GeometryError for a size below 1, an unknown dtype or a name that occurs twice.
    """
    if blocks_per_chunk < 1:
        raise GeometryError(f"blocks_per_chunk must be at least 1, not {blocks_per_chunk}")
    alike: dict[LayerShape, list[str]] = {}
    seen: set[str] = set()
    for layer in layers:
        _check_layer(layer)
        if layer.name in seen:
            raise GeometryError(f"layer {layer.name} is listed twice")
        seen.add(layer.name)
        alike.setdefault(replace(layer, name=""), []).append(layer.name)
    segments = []
    offset = 0
    for kind, names in alike.items():
        count = len(names)
        shape: tuple[int, ...]
        if kind.content == OPAQUE:
            shape = (kind.heads, count * blocks_per_chunk * kind.width)
        else:
            shape = (kind.heads, count, blocks_per_chunk * kind.tokens, kind.width)
        nbytes = kind.heads * count * blocks_per_chunk * kind.block_bytes
        segments.append(SegmentShape(kind.dtype, shape, tuple(names), offset, nbytes))
        offset += nbytes
    return tuple(segments)


def _check_layer(layer: LayerShape) -> None:
    if layer.dtype not in DTYPE_BYTES:
        raise GeometryError(f"layer {layer.name}: unknown dtype {layer.dtype}")
    if layer.content != TOKEN_MAJOR and (layer.dtype, layer.tokens) != ("U8", 1):
        raise GeometryError(f"layer {layer.name}: {layer.content} content is U8 with tokens = 1")
    for field in ("heads", "tokens", "width"):
        value = getattr(layer, field)
        if not isinstance(value, int) or value < 1:
            raise GeometryError(f"layer {layer.name}: {field} must be at least 1, not {value}")


@dataclass(frozen=True)
class LayerCache:
    """One layer's KV cache on this worker, in normal form.

    view: uint8 `[B * kernel_blocks, H, N, P, E]`: kernel blocks, local heads, rows, planes, bytes
        of one plane. Any strides, but E has stride 1 and no two positions share a byte. A row is a
        token (token-major); P is 2 for split K/V caches, else 1. Head slabs have N = P = 1. For
        opaque content H is 1 and `[N, P, E]` are a block's bytes in logical order.
    kernel_blocks: consecutive entries of the first axis that form one block.
    """

    name: str
    content: str
    dtype: str
    view: torch.Tensor
    kernel_blocks: int = 1

    @property
    def num_blocks(self) -> int:
        """vLLM's number of blocks."""
        return self.view.shape[0] // self.kernel_blocks

    def shape(self, heads: int) -> LayerShape:
        """What this layer puts into a page when all ranks together hold `heads` heads."""
        _, _, rows, planes, plane_bytes = self.view.shape
        if self.content == TOKEN_MAJOR:
            tokens, row_bytes = self.kernel_blocks * rows, planes * plane_bytes
            width = row_bytes // DTYPE_BYTES[self.dtype]
            return LayerShape(self.name, self.content, self.dtype, heads, tokens, width)
        nbytes = self.kernel_blocks * rows * planes * plane_bytes
        return LayerShape(self.name, self.content, "U8", heads, 1, nbytes)


def token_major(name: str, view: torch.Tensor) -> LayerCache:
    """A cache whose heads hold their tokens in order, each one run of C elements.

    view: `[B, H, N, C]`, any dtype of `DTYPE_NAMES`, last stride 1; vLLM's six layouts differ in
        the other strides only.
    Raises GeometryError when the view is something else.
    """
    _check_view(name, view, 4)
    return _normal(name, TOKEN_MAJOR, view.unsqueeze(3))


def head_slabs(name: str, view: torch.Tensor) -> LayerCache:
    """A cache whose bytes per block and head are one contiguous run of unknown order.

    view: `[B, H, N, C]`, each `[N, C]` contiguous.
    Raises GeometryError when the view is something else.
    """
    _check_view(name, view, 4)
    runs = _merge(list(zip(view.shape[2:], view.stride()[2:], strict=True)))
    if len(runs) > 1 or runs[0][1] != 1:
        raise GeometryError(f"layer {name}: a head's slab of one block is not one contiguous run")
    blocks, heads = view.shape[:2]
    sizes = (blocks, heads, 1, 1, runs[0][0])
    slabs = view.as_strided(sizes, (*view.stride()[:2], 1, 1, 1))
    return _normal(name, HEAD_SLABS, slabs)


def opaque(name: str, view: torch.Tensor) -> LayerCache:
    """A cache of unknown content: the bytes of each block, in logical order.

    view: `[B, ...]`, whose axes after the first merge into at most three runs of bytes.
    Raises GeometryError when they do not.
    """
    _check_view(name, view, None)
    item = view.element_size()
    axes = [(n, s * item) for n, s in zip(view.shape[1:], view.stride()[1:], strict=True)]
    runs = _merge([*axes, (item, 1)])
    if len(runs) > 3:
        raise GeometryError(f"layer {name}: the bytes of one block are strided more than two-fold")
    runs = [(1, 1)] * (4 - len(runs)) + runs
    sizes = (view.shape[0], *(size for size, _ in runs))
    strides = (view.stride(0) * item, *(stride for _, stride in runs))
    return _normal(name, OPAQUE, _bytes(view, sizes, strides))


def split_kernel_blocks(cache: LayerCache, num_blocks: int) -> LayerCache:
    """The cache with `num_blocks` blocks, of which each is k consecutive kernel blocks.

    vLLM splits a block into k smaller ones when an attention kernel wants them, and the first axis
    of the view then counts kernel blocks. Block b is the kernel blocks `b * k ... b * k + k - 1`,
    whose tokens follow each other. No stride describes that in every layout, so the cache stays
    kernel-block granular and the copy maps block ids.
    Raises GeometryError when the first axis is no multiple of `num_blocks`.
    """
    total = cache.view.shape[0]
    if num_blocks < 1 or total % num_blocks:
        raise GeometryError(
            f"layer {cache.name}: {total} kernel blocks make no {num_blocks} blocks"
        )
    return replace(cache, kernel_blocks=total // num_blocks)


def _check_view(name: str, view: torch.Tensor, axes: int | None) -> None:
    if axes is not None and view.ndim != axes:
        raise GeometryError(f"layer {name}: expected {axes} axes, the view has {view.ndim}")
    if view.ndim < 1 or view.numel() == 0:
        raise GeometryError(f"layer {name}: the view is empty, shape {tuple(view.shape)}")
    if view.dtype not in DTYPE_NAMES:
        raise GeometryError(f"layer {name}: dtype {view.dtype} is not supported")


def _normal(name: str, content: str, view: torch.Tensor) -> LayerCache:
    """`view` [B, H, N, P, E] as bytes, checked for contiguous planes and overlaps."""
    dtype = DTYPE_NAMES[view.dtype]
    item = view.element_size()
    *outer, last = view.stride()
    if last != 1 and view.shape[-1] > 1:
        raise GeometryError(f"layer {name}: the last axis has stride {last}, not 1")
    *sizes, width = view.shape
    # the stride of an axis of size 1 means nothing and would only spoil the alignment
    strides = [s * item if n > 1 else 0 for n, s in zip(sizes, outer, strict=True)]
    as_bytes = _bytes(view, (*sizes, width * item), (*strides, 1))
    reach = 1  # bytes spanned by the axes with smaller strides
    for stride, size in sorted(zip(as_bytes.stride(), as_bytes.shape, strict=True)):
        if size > 1 and stride < reach:
            raise GeometryError(
                f"layer {name}: overlaps itself, shape {tuple(view.shape)}, strides {view.stride()}"
            )
        reach += (size - 1) * stride
    return LayerCache(name, content, dtype, as_bytes)


def _bytes(view: torch.Tensor, sizes: Iterable[int], strides: Iterable[int]) -> torch.Tensor:
    """A uint8 view on the same memory, with sizes and strides in bytes.

    Axes of size 1 get stride 0: whatever they had must not spoil the alignment.
    """
    start = view.storage_offset() * view.element_size()
    target = torch.empty(0, dtype=torch.uint8, device=view.device)
    sizes = tuple(sizes)
    *outer, last = (s if n > 1 else 0 for n, s in zip(sizes, strides, strict=True))
    return target.set_(view.untyped_storage(), start, sizes, (*outer, last or 1))


def _merge(axes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(size, stride) axes, outermost first, with neighbours joined where they are one run."""
    merged: list[tuple[int, int]] = []
    for size, stride in axes:
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            size *= merged.pop()[0]
        merged.append((size, stride))
    return merged or [(1, 1)]
