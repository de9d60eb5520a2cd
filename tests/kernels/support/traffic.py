"""Random jobs on a GPU pipeline, with the CPU pipeline as their model."""

from dataclasses import replace
from random import Random

import numpy as np
import torch
from device_checks import Machine, fill
from kernel_worlds import Model, Rank

from kvstrata.kernels.cpu import CpuPipeline
from kvstrata.kernels.gpu.transport import Transport
from kvstrata.kernels.pipeline import GroupWork


class Side:
    """Caches of two groups, and a region; group 1 has two segments."""

    def __init__(
        self,
        model: Model,
        blocks: int,
        slots: int,
        *,
        device: torch.device | str = "cpu",
        **world: object,
    ) -> None:
        small = replace(model, layers=1, heads=1, dim=1)
        self.ranks = [
            Rank(model, "LBHNC", blocks=blocks, device=device, **world),
            Rank(model, "BLNHC", blocks=blocks, device=device, **world),
            Rank(small, "LBHNC", blocks=blocks, device=device),
        ]
        first, second, other = (rank.segments for rank in self.ranks)
        behind = replace(other[0], page_offset=model.page_bytes)
        self.groups = {0: first, 1: (*second, behind)}
        size = model.page_bytes + small.page_bytes
        self.region = torch.full((slots, size), 0x11, dtype=torch.uint8)

    def views(self, group: int) -> list[torch.Tensor]:
        return [view for s in self.groups[group] for layers in s.sets for view in layers.views]


class Traffic:
    """Jobs of one to three pages of both groups, stores and loads of both kinds, and a model that
    overwrites the blocks of some of them right after a fence.

    Blocks and slots of jobs under way are left alone, as vLLM and the primary tier do. No job is
    asked for before blocks or slots run out.
    """

    def __init__(
        self, machine: Machine, model: Model, *, blocks: int, slots: int, seed: int = 0
    ) -> None:
        self.machine = machine
        self.random = Random(seed)
        self.real = Side(model, blocks, slots, device=machine.memory)
        self.model = Side(model, blocks, slots)
        for number, ranks in enumerate(zip(self.model.ranks, self.real.ranks, strict=True)):
            fill(*(rank.buffer for rank in ranks), seed=number)
        self.width = model.blocks_per_chunk
        self.slots = list(range(slots))
        self.blocks = {group: list(range(blocks)) for group in (0, 1)}
        self.under_way: dict[int, tuple[int, list[int], list[int]]] = {}
        self.most_under_way = 0
        self.moved: dict[int, int] = {}  # bytes of each job

    def run(self, jobs: int, transport: Transport | None) -> None:
        """Submit them all, wait, and compare both regions and all caches."""
        with self.machine.open(self.real.groups, self.real.region, transport) as pipeline:
            self.pipeline = pipeline
            self.oracle = CpuPipeline(self.model.groups, self.model.region)
            for job in range(jobs):
                self.submit(job)
                if self.random.random() < 0.1:
                    self.overwrite(self.random.choice(list(self.under_way)))
            self.settle(jobs)
        self.machine.finish()
        assert torch.equal(self.real.region, self.model.region)
        for real, model in zip(self.real.ranks, self.model.ranks, strict=True):
            assert torch.equal(real.buffer.cpu(), model.buffer)

    def submit(self, job: int) -> None:
        group, pages = self.random.randrange(2), self.random.randint(1, 3)
        while len(self.slots) < pages or len(self.blocks[group]) < pages * self.width:
            self.settle(len(self.under_way) // 3 + 1)
        slots = self.take(self.slots, pages)
        blocks = self.take(self.blocks[group], pages * self.width)
        self.under_way[job] = (group, blocks, slots)
        self.most_under_way = max(self.most_under_way, len(self.under_way))
        ids = np.array([-1 if self.random.random() < 0.05 else block for block in blocks])
        work = [GroupWork(group, np.array(slots), ids.reshape(pages, self.width))]
        kind = self.random.choice(["store", "load", "expedited"])
        for pipeline in (self.oracle, self.pipeline):
            if kind == "store":
                pipeline.submit_store(job, work)
            else:
                pipeline.submit_load(job, work, expedited=kind == "expedited")

    def take(self, free: list[int], count: int) -> list[int]:
        """Any of them, in constant time."""
        for last in range(len(free) - 1, len(free) - 1 - count, -1):
            at = self.random.randint(0, last)
            free[at], free[last] = free[last], free[at]
        return [free.pop() for _ in range(count)]

    def overwrite(self, job: int) -> None:
        group, blocks, slots = self.under_way[job]
        self.pipeline.fence({job})
        value = self.random.randrange(256)
        for block in blocks:
            for view in self.model.views(group):
                view[block].fill_(value)
            for view in self.real.views(group):
                self.machine.compute(lambda block=view[block]: block.fill_(value))
        self.blocks[group] += blocks
        self.under_way[job] = (group, [], slots)

    def settle(self, count: int) -> None:
        """Wait for the oldest jobs, and take what is done."""
        self.pipeline.wait(list(self.under_way)[:count])
        self.moved |= {done.job_id: done.nbytes for done in self.oracle.finished()}
        for done in self.pipeline.finished():
            assert done.nbytes == self.moved.pop(done.job_id)
            group, blocks, slots = self.under_way.pop(done.job_id)
            self.blocks[group] += blocks
            self.slots += slots
