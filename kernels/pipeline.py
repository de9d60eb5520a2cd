"""Moving chunks between KV caches and the page region: the interface, and the CPU's form of it."""

import time
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from kvstrata.kernels.compare import Comparison
from kvstrata.kernels.geometry import GeometryError
from kvstrata.kernels.pack_cpu import copy_cpu
from kvstrata.kernels.plan import Segment
from kvstrata.kernels.transport import Transport


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


class CpuPipeline:
    """The pipeline where KV caches lie in CPU memory: every job is done when its submit returns.

    The copies stay on the engine's thread: the 71 MB of a 1,513-token prompt of SmolLM2-135M in
    float32 took 5.5 ms to store and 4.2 ms to load on the two-core machine whose prefill of that
    prompt takes 8 s, which is 0.07 %. A thread would save less than that, for it competes with the
    model for the same cores, and would add a hand-over to every job.

    groups: this worker's segments by group.
    region: uint8 [slots, slot bytes] in CPU memory; page p of a group fills the start of a slot.
    """

    def __init__(self, groups: Groups, region: torch.Tensor) -> None:
        check_region(groups, region)
        self._groups = groups
        self._region = region
        self._finished: list[Finished] = []

    def submit_store(self, job_id: int, work: Sequence[GroupWork]) -> None:
        self._run(job_id, work, unpack=False)

    def submit_load(self, job_id: int, work: Sequence[GroupWork], expedited: bool = False) -> None:
        self._run(job_id, work, unpack=True)

    def finished(self) -> list[Finished]:
        done, self._finished = self._finished, []
        return done

    def fence(self, job_ids: Collection[int]) -> None:
        pass  # done at submit

    def wait(self, job_ids: Collection[int]) -> None:
        pass  # done at submit

    def describe(self) -> str:
        return "pages are copied by the CPU"

    def pin(self, slots: range) -> None:
        pass  # any memory will do

    def shutdown(self) -> None:
        pass  # holds nothing

    def _run(self, job_id: int, work: Sequence[GroupWork], *, unpack: bool) -> None:
        start = time.perf_counter()
        check_work(self._groups, self._region, work)
        nbytes = 0
        for group, slots, block_ids in work:
            for segment in self._groups[group]:
                mine = slice(None) if unpack else elected(segment, slots)
                rows = torch.from_numpy(slots[mine])
                ids = torch.from_numpy(block_ids[mine])
                copy_cpu(segment, segment.in_page, self._region, rows, ids, unpack=unpack)
                nbytes += rows.numel() * segment.shard_bytes
        self._finished.append(Finished(job_id, nbytes, time.perf_counter() - start))


def check_cpu_pipeline(groups: Groups, region: torch.Tensor, slots: range) -> None:
    """Move a pattern through the pipeline, and compare blocks and region with the oracle's.

    slots: of the region, used by nobody else; they and the blocks are as before afterwards.
    Raises GeometryError, naming the layer, where bytes differ.
    """
    check_region(groups, region)
    for segments in groups.values():
        for segment in segments:
            pipeline = CpuPipeline({0: (segment,)}, region)
            comparison = Comparison(segment, region, slots)

            def store(slots: np.ndarray, ids: np.ndarray, to: Pipeline = pipeline) -> None:
                to.submit_store(0, [GroupWork(0, slots, ids)])

            def load(slots: np.ndarray, ids: np.ndarray, to: Pipeline = pipeline) -> None:
                to.submit_load(0, [GroupWork(0, slots, ids)])

            for move in (store, load):
                if found := comparison.difference(move, store=move is store):
                    raise GeometryError(f"the copy on the CPU {found}")


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


def open_pipeline(
    groups: Groups,
    region: torch.Tensor,
    transport: Transport | None = None,
    scratch: range | None = None,
    ready: int | None = None,
) -> Pipeline:
    """The pipeline for the device on which the KV caches lie, once it moved a pattern right.

    groups, region: see `CpuPipeline`. Nothing may be in use yet.
    transport: between a GPU and the region, of everything; None finds the best by trying.
    scratch: slots that no other worker uses now; all, unless given. They and the blocks are as
        before afterwards.
    ready: how many slots, from the first on, scratch among them, have memory and are made usable;
        all, unless given. `Pipeline.pin` makes the others so.
    Raises ValueError when the caches lie on several devices or on an unsupported one, and
    RuntimeError when bytes arrive otherwise than they should.
    """
    slots = range(len(region)) if scratch is None else scratch
    devices = {segment.device for segments in groups.values() for segment in segments}
    if all(device.type == "cpu" for device in devices):
        check_cpu_pipeline(groups, region, slots)
        return CpuPipeline(groups, region)
    if len(devices) > 1 or {device.type for device in devices} != {"cuda"}:
        raise ValueError(f"KV caches on {sorted(map(str, devices))} are not supported")
    from kvstrata.kernels.device import CudaDevice
    from kvstrata.kernels.gpu import GpuPipeline
    from kvstrata.kernels.pack import prepare_triton

    (device,) = devices
    return GpuPipeline(groups, region, CudaDevice(device), prepare_triton, transport, slots, ready)
