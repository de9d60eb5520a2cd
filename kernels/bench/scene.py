"""What the contestants move: one rank's caches, shuffled blocks, and pages in pinned memory.

Stores and loads have blocks and pages of their own, so that both can run at once and both can be
checked: before each check the caches get new random bytes, so nothing that an earlier run left
can pass for a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from kvstrata.kernels.bench.models import Model, rank_caches
from kvstrata.kernels.gpu.transport import Fragments
from kvstrata.kernels.pack import copy_torch
from kvstrata.kernels.pipeline import Groups, GroupWork
from kvstrata.kernels.plan import Segment


class Contestant(Protocol):
    """Who moves pages of a scene.

    per_fragment: whether each contiguous piece costs it a descriptor, so that the number of
        pages is limited where these are tiny.
    """

    name: str
    per_fragment: bool

    def submit(self, stores: Sequence[GroupWork], loads: Sequence[GroupWork]) -> None:
        """Start to store and to load, after what is queued on the current stream."""

    def wait(self) -> None:
        """Return when all that was submitted is done."""

    def close(self) -> None:
        """Wait, and give back what it holds."""


class WrongBytes(Exception):
    """A contestant moved other bytes than the oracle."""


def page_bytes(model: Model, per_chunk: int) -> int:
    """Bytes of a slot: of the largest group's page over all ranks."""
    tokens = [group.token_bytes * group.block_tokens for group in model.groups]
    return per_chunk * max(tokens)


def region_bytes(model: Model, most_blocks: int) -> int:
    """Host memory that a scene needs."""
    return 2 * len(model.groups) * most_blocks * page_bytes(model, 1)


class Scene:
    """Rank 0's part of a model in one layout.

    memory: uint8 [at least `region_bytes`] on the CPU, pinned where the device asks for it.
    most_blocks: that are stored at once, and loaded at once, of each group.
    """

    def __init__(
        self,
        model: Model,
        layout: str,
        per_chunk: int,
        most_blocks: int,
        memory: torch.Tensor,
        device: torch.device,
    ) -> None:
        self.model, self.layout, self.per_chunk = model, layout, per_chunk
        self.device = device
        self.groups: Groups = {
            number: rank_caches(
                group,
                layout,
                num_blocks=2 * most_blocks,
                blocks_per_chunk=per_chunk,
                tp=model.tp,
                device=device,
            )
            for number, group in enumerate(model.groups)
        }
        self.fragments = {
            number: [Fragments(segment, segment.in_page) for segment in segments]
            for number, segments in self.groups.items()
        }
        self.most_pages = most_blocks // per_chunk
        shape = 2 * len(self.groups) * self.most_pages, page_bytes(model, per_chunk)
        self.region = memory[: shape[0] * shape[1]].view(shape)
        random = np.random.default_rng(0)
        self._stores: list[GroupWork] = []
        self._loads: list[GroupWork] = []
        for number in self.groups:
            blocks = random.permutation(2 * most_blocks)
            for half, works in enumerate((self._stores, self._loads)):
                slots = random.permutation(self.most_pages) + self.most_pages * (2 * number + half)
                mine = blocks[half * most_blocks :][: self.most_pages * per_chunk]
                works.append(GroupWork(number, slots, mine.reshape(-1, per_chunk)))
        self._renew()
        for _, slots, _ in self._loads:
            rows = self.region[slots.min() : slots.max() + 1]
            rows.copy_(torch.empty(rows.shape, dtype=torch.uint8, device=device).random_(0, 256))

    def stores(self, pages: int) -> list[GroupWork]:
        """Work on so many pages of each group."""
        return [
            GroupWork(number, slots[:pages], ids[:pages]) for number, slots, ids in self._stores
        ]

    def loads(self, pages: int) -> list[GroupWork]:
        """The same, of other blocks and pages."""
        return [GroupWork(g, slots[:pages], ids[:pages]) for g, slots, ids in self._loads]

    def nbytes(self, works: Sequence[GroupWork]) -> int:
        """Bytes that this rank moves."""
        return sum(
            len(slots) * segment.shard_bytes
            for number, slots, _ in works
            for segment in self.groups[number]
        )

    @property
    def fragments_per_page(self) -> int:
        """Of the group that has the most."""
        return self.per_chunk * max(
            sum(fragments.per_block for fragments in some) for some in self.fragments.values()
        )

    @property
    def fragment_bytes(self) -> int:
        """Mean size."""
        every = [fragments for some in self.fragments.values() for fragments in some]
        pieces = sum(fragments.per_block for fragments in every)
        return round(sum(f.per_block * f.mean_bytes for f in every) / pieces)

    def verify(self, contestant: Contestant, pages: int) -> None:
        """Store and load so many pages at once and compare all bytes with the oracle's.

        Raises WrongBytes when they differ.
        """
        stores, loads = self.stores(pages), self.loads(pages)
        self._renew()
        wanted = self._packed(stores)
        contestant.submit(stores, loads)
        contestant.wait()
        where = f"{self.model.name}, {self.layout}, {pages} pages of {self.per_chunk} blocks"
        if not _equal(self._shards(stores), wanted):
            raise WrongBytes(f"{contestant.name}: {where}: the store wrote other pages")
        if not _equal(self._packed(loads), self._shards(loads)):
            raise WrongBytes(f"{contestant.name}: {where}: the load wrote other blocks")

    def _renew(self) -> None:
        """New random bytes in all caches."""
        for segments in self.groups.values():
            for segment in segments:
                storages = {
                    view.untyped_storage().data_ptr(): view.untyped_storage()
                    for layers in segment.sets
                    for view in layers.views
                }
                for storage in storages.values():
                    torch.empty(0, dtype=torch.uint8, device=self.device).set_(storage).random_()

    def _packed(self, works: Sequence[GroupWork]) -> list[torch.Tensor]:
        """The shards that the blocks make, uint8 [pages, bytes] on the device, by the oracle."""
        packed = []
        for number, _, ids in works:
            there = torch.from_numpy(ids).to(self.device)
            rows = torch.arange(len(ids), device=self.device)
            for segment in self.groups[number]:
                shape = (len(ids), segment.shard_bytes)
                shards = torch.empty(shape, dtype=torch.uint8, device=self.device)
                copy_torch(segment, segment.packed(0), shards, rows, there, unpack=False)
                packed.append(shards)
        return packed

    def _shards(self, works: Sequence[GroupWork]) -> list[torch.Tensor]:
        """The shards that the pages hold, in the same form."""
        held = []
        for number, slots, _ in works:
            first = slots.min()
            pages = self.region[first : slots.max() + 1].to(self.device)
            rows = torch.from_numpy(slots - first).to(self.device)
            for segment in self.groups[number]:
                held.append(pages[rows, shard_of(segment)])
        return held


def shard_of(segment: Segment) -> slice:
    """The one range of a page that the segment's worker owns."""
    shard = segment.shard
    assert shard.count == 1  # no pipeline parallelism here
    return slice(shard.offset, shard.offset + shard.length)


def _equal(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
