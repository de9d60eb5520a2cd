"""What moves together: a part of a segment, and some pages of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kvstrata.kernels.plan import Segment
from kvstrata.kernels.transport import LEAST_RUN, Choice, Fragments, Transport

# Pieces of one direct copy: keeps its arrays small.
MAX_PIECES = 1 << 16


class Part:
    """A segment, or some heads of it, that moves as one: what its transports need.

    pitch: bytes from one staged page to the next, aligned for 16-byte accesses.
    store, load: the transports of each direction.
    """

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.shard_bytes = segment.shard_bytes
        self.pitch = segment.shard_bytes + (-segment.shard_bytes) % 16
        self.fragments = Fragments(segment, segment.in_page)
        self.store = self.load = Choice(Transport.STAGED, Transport.STAGED)

    def choice(self, *, store: bool) -> Choice:
        """The transports of a direction."""
        return self.store if store else self.load

    def choose(self, choice: Choice, *, store: bool) -> None:
        """Move that direction so from now on."""
        if store:
            self.store = choice
        else:
            self.load = choice

    def pages(self, transport: Transport, slot_bytes: int, count: int) -> int:
        """How many of `count` pages one batch takes; slot_bytes: of a staging slot."""
        if transport is Transport.STAGED:
            return slot_bytes // self.pitch
        if transport is Transport.DIRECT:
            return max(1, MAX_PIECES // (self.fragments.per_block * self.segment.blocks_per_chunk))
        return count

    def may_pay(self, transport: Transport) -> bool:
        """Whether it is worth a trial."""
        return transport is not Transport.DIRECT or self.fragments.mean_bytes >= LEAST_RUN


@dataclass(frozen=True)
class Batch:
    """Pages of one part that move together.

    slots, block_ids: int64 [n] and [n, blocks_per_chunk]; there_*: the same on the device.
    """

    part: Part
    slots: np.ndarray
    block_ids: np.ndarray
    there_slots: torch.Tensor
    there_ids: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that this worker moves."""
        return len(self.slots) * self.part.shard_bytes
