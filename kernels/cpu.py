"""The pipeline where KV caches lie in CPU memory, and its check at start."""

import time
from collections.abc import Collection, Sequence
from functools import partial

import numpy as np
import torch

from kvstrata.kernels.compare import Comparison
from kvstrata.kernels.geometry import GeometryError
from kvstrata.kernels.pack_cpu import copy_cpu
from kvstrata.kernels.pipeline import (
    Finished,
    Groups,
    GroupWork,
    check_region,
    check_work,
    elected,
)


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
            comparison = Comparison(segment, region, slots)
            for store in (True, False):
                move = partial(_move, CpuPipeline({0: (segment,)}, region), store)
                if found := comparison.difference(move, store=store):
                    raise GeometryError(f"the copy on the CPU {found}")


def _move(pipeline: CpuPipeline, store: bool, slots: np.ndarray, ids: np.ndarray) -> None:
    submit = pipeline.submit_store if store else pipeline.submit_load
    submit(0, [GroupWork(0, slots, ids)])
