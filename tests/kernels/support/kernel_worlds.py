"""Small KV caches of known content, for the tests of this folder, and a naive page to compare with.

Every element encodes its layer, chunk-order block, head, token, K or V, and dimension.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from copies import split_kv

from kvstrata.kernels.bench.models import LAYOUTS as LAYOUTS
from kvstrata.kernels.geometry import (
    DTYPE_NAMES,
    TOKEN_MAJOR,
    LayerShape,
    split_kernel_blocks,
    token_major,
)
from kvstrata.kernels.plan import LocalLayer, Segment, plan

SPLIT = {"split-outer": "LPBHND", "split-inner": "LBPNHD"}
GUARD = 64  # elements of guard on both sides of every allocation
# Where the kernel runs: on a GPU where there is one, else interpreted on the CPU.
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
# The GPU's tests take a real one's time, and less of a stand-in's.
FULL_SIZE = "stand_in" not in sys.modules
DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Model:
    """What all ranks together hold. `size` is the element size in bytes, `dim` that of K and V."""

    layers: int = 2
    heads: int = 4
    tokens: int = 2
    dim: int = 8
    size: int = 2
    chunks: int = 2
    blocks_per_chunk: int = 2

    @property
    def page_bytes(self) -> int:
        return int(np.prod([self.layers, self.heads, self.blocks_per_chunk, self.tokens])) * (
            2 * self.dim * self.size
        )

    def shapes(self) -> list[LayerShape]:
        dtype = DTYPE_NAMES[DTYPES[self.size]]
        return [
            LayerShape(f"layer.{i}", TOKEN_MAJOR, dtype, self.heads, self.tokens, 2 * self.dim)
            for i in range(self.layers)
        ]

    def content(self) -> torch.Tensor:
        """[layers, chunk-order blocks, heads, tokens, 2 * dim], K then V."""
        blocks = self.chunks * self.blocks_per_chunk
        axes = (self.layers, blocks, self.heads, self.tokens, 2, self.dim)
        code = np.arange(1, np.prod(axes) + 1, dtype=np.uint64).reshape(axes)
        if self.size < 4:  # too narrow for a unique code: mix the bits
            code = (code * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - 8 * self.size)
        flat = code.reshape(*axes[:4], 2 * self.dim)
        integers = {1: np.uint8, 2: np.uint16, 4: np.uint32}[self.size]
        return torch.from_numpy(flat.astype(integers)).view(DTYPES[self.size])

    def naive_pages(self, block_ids: torch.Tensor) -> torch.Tensor:
        """uint8 [chunks, page bytes], token by token; missing blocks are zeros."""
        content = self.content().numpy()
        pages = b""
        for chunk in range(self.chunks):
            for head in range(self.heads):
                for layer in range(self.layers):
                    for block in range(self.blocks_per_chunk):
                        index = chunk * self.blocks_per_chunk + block
                        for token in range(self.tokens):
                            vector = content[layer, index, head, token].tobytes()
                            there = block_ids[chunk, block] >= 0
                            pages += vector if there else bytes(len(vector))
        flat = torch.frombuffer(bytearray(pages), dtype=torch.uint8)
        return flat.view(self.chunks, -1).to(block_ids.device)


class Rank:
    """One worker's empty caches, guarded on both sides and filled with a constant.

    shift: elements by which the caches miss an aligned address.
    layers: the layers that it holds; all, unless said.
    """

    def __init__(
        self,
        model: Model,
        layout: str,
        *,
        blocks: int = 9,
        tp: int = 1,
        rank: int = 0,
        shift: int = 0,
        layers: range | None = None,
        kernel_blocks: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model, self.layout, self.kernel_blocks = model, layout, kernel_blocks
        self.layers = range(model.layers) if layers is None else layers
        local = max(1, model.heads // tp)
        replicas = max(1, tp // model.heads)
        self.first_head = rank * model.heads // tp
        sizes = {
            "L": len(self.layers),
            "B": blocks * kernel_blocks,
            "H": local,
            "N": model.tokens // kernel_blocks,
        }
        if layout in SPLIT:
            sizes = {"L": sizes["L"], "P": 2, **sizes, "D": model.dim}
        else:
            sizes["C"] = 2 * model.dim
        order = SPLIT.get(layout, layout)
        total = int(np.prod(list(sizes.values())))
        length, dtype = total + 2 * GUARD + shift, DTYPES[model.size]
        self.buffer = torch.full((length,), 85, dtype=dtype, device=device)
        memory = self.buffer[GUARD + shift :][:total].view([sizes[axis] for axis in order])
        self.view = memory.permute([order.index(axis) for axis in sizes])
        caches = []
        for i, layer in enumerate(self.layers):
            name, view = f"layer.{layer}", self.view[i]
            cache = split_kv(name, *view) if layout in SPLIT else token_major(name, view)
            caches.append(split_kernel_blocks(cache, blocks))
        self.caches = caches
        held = {c.name: LocalLayer(c, self.first_head, replicas, rank % replicas) for c in caches}
        self.segments: tuple[Segment, ...] = plan(model.shapes(), held, model.blocks_per_chunk)

    def places(self, layer: int, block: int) -> Iterator[tuple[torch.Tensor, slice, slice]]:
        """Where one block of one layer lies: pieces [heads, tokens, elements] of the memory, with
        the tokens and the elements (K then V) that they hold."""
        tokens = self.model.tokens // self.kernel_blocks
        dim = self.model.dim
        for i in range(self.kernel_blocks):
            inside = slice(i * tokens, (i + 1) * tokens)
            at = block * self.kernel_blocks + i
            if self.layout in SPLIT:
                for plane in range(2):
                    elements = slice(plane * dim, (plane + 1) * dim)
                    yield self.view[layer, plane, at], inside, elements
            else:
                yield self.view[layer, at], inside, slice(0, 2 * dim)

    def write(self, block_ids: torch.Tensor) -> "Rank":
        """Put the model's content into the blocks, block_ids [chunks, blocks_per_chunk]."""
        content = self.model.content()
        for index, block in enumerate(block_ids.flatten().tolist()):
            for i, layer in enumerate(self.layers):
                wanted = content[layer, index, self.first_head :]
                for memory, tokens, elements in self.places(i, block) if block >= 0 else ():
                    memory.copy_(wanted[: len(memory), tokens, elements])
        return self


def some_blocks(
    model: Model, blocks: int = 9, seed: int = 0, device: torch.device = DEVICE
) -> torch.Tensor:
    """Distinct block ids, int64 [chunks, blocks_per_chunk], in no order."""
    generator = torch.Generator().manual_seed(seed)
    count = model.chunks * model.blocks_per_chunk
    return torch.randperm(blocks, generator=generator)[:count].view(model.chunks, -1).to(device)


def guarded_pages(rows: int, nbytes: int, shift: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(buffer, pages [rows, nbytes + 32]) on DEVICE: pages inside a buffer of a constant, `shift`
    bytes off an aligned address; the bytes after `nbytes` belong to nobody."""
    pitch = nbytes + 32 + (-nbytes) % 16
    length = rows * pitch + 128 + shift
    buffer = torch.full((length,), 0xA5, dtype=torch.uint8, device=DEVICE)
    return buffer, buffer[64 + shift :][: rows * pitch].view(rows, pitch)
