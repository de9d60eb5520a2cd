"""Moving chunks between KV caches and the page region: the interface of `cpu.py` and `gpu/`."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from kvstrata.kernels.plan import Segment


class GroupWork(NamedTuple):
    """Chunks of one KV cache group to store or to load.

    group: index of the group.
    slots: int64 [n], the region slot of each chunk's page.
    block_ids: int64 [n, blocks_per_chunk], the blocks of each chunk; -1 is a missing block, stored
        as zeros and left alone by a load.
    """

    group: int
    slots: np.ndarray
    block_ids: np.ndarray


class Finished(NamedTuple):
    """A job that is done: bytes this worker moved, and how long that took."""

    job_id: int
    nbytes: int
    seconds: float


class Pipeline(Protocol):
    """Stores and loads of one worker. Calls come from one thread."""

    def submit_store(self, job_id: int, work: Sequence[GroupWork]) -> None:
        """Start to copy blocks to pages, after all work queued on the compute stream so far.

        Raises ValueError, before anything moves, for slots or blocks that do not exist.
        """

    def submit_load(self, job_id: int, work: Sequence[GroupWork], expedited: bool = False) -> None:
        """Start to copy pages to blocks; expedited loads do not queue behind others.

        Raises ValueError, before anything moves, for slots or blocks that do not exist.
        """

    def finished(self) -> list[Finished]:
        """The jobs that are done since the last call. Does not wait."""

    def fence(self, job_ids: Collection[int]) -> None:
        """Order the model behind these jobs: what is queued on the compute stream from now on
        comes after stores have read their blocks and loads have written theirs. Unknown ids are
        left out."""

    def wait(self, job_ids: Collection[int]) -> None:
        """Return when these jobs are done; ids that are unknown or reported count as done."""

    def describe(self) -> str:
        """How pages move here, in one line for the log."""

    def pin(self, slots: range) -> None:
        """Make slots usable that were not ready before. From any thread.

        Raises RuntimeError when they cannot be.
        """

    def shutdown(self) -> None:
        """Wait for everything and release what the pipeline holds. Callable twice."""


Groups = Mapping[int, tuple[Segment, ...]]


def elected(segment: Segment, slots: np.ndarray) -> np.ndarray:
    """bool [n]: the slots that this worker writes among the replicas of its heads."""
    mine: np.ndarray = slots % segment.replicas == segment.replica
    return mine


def check_region(groups: Groups, region: torch.Tensor) -> None:
    """Raise ValueError unless `region` is uint8 [slots, bytes] on the CPU and holds every page."""
    if region.dtype != torch.uint8 or region.ndim != 2 or region.device.type != "cpu":
        raise ValueError("the region must be uint8 [slots, slot bytes] in CPU memory")
    if not region.is_contiguous():
        raise ValueError("the region must be contiguous")
    for group, segments in groups.items():
        for segment in segments:
            end = segment.page_offset + segment.heads * segment.head_bytes
            if end > region.shape[1]:
                raise ValueError(
                    f"group {group}: a page of {end} bytes does not fit into {region.shape[1]}"
                )


def check_work(groups: Groups, region: torch.Tensor, work: Sequence[GroupWork]) -> None:
    """Raise ValueError for a group, shape, slot or block that does not exist."""
    for group, slots, block_ids in work:
        if group not in groups:
            raise ValueError(f"group {group} is not one of {sorted(groups)}")
        if slots.dtype != np.int64 or block_ids.dtype != np.int64 or slots.ndim != 1:
            raise ValueError("slots must be int64 [n] and block_ids int64 [n, blocks per chunk]")
        if slots.size == 0:
            continue
        if slots.min() < 0 or slots.max() >= region.shape[0]:
            raise ValueError(f"slots {slots.min()} to {slots.max()}, of {region.shape[0]}")
        for segment in groups[group]:
            if block_ids.shape != (slots.size, segment.blocks_per_chunk):
                raise ValueError(
                    f"block_ids {block_ids.shape} for {slots.size} slots of "
                    f"{segment.blocks_per_chunk} blocks per chunk"
                )
            if block_ids.min() < -1 or block_ids.max() >= segment.num_blocks:
                raise ValueError(
                    f"blocks {block_ids.min()} to {block_ids.max()}, of {segment.num_blocks}"
                )
