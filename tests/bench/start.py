"""`python -m tests.bench.start`: how long the CPU tier takes to become usable.

Processes stand for an engine's workers, with the code of `kvstrata.offload.primary.reserver`;
where there are GPUs they pin, too. Beside it what an engine did before and others do: one thread
that reserves everything while the engine waits.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Barrier
from typing import Annotated

import torch
import typer

from kvstrata.kernels.gpu.device import CudaDevice
from kvstrata.offload.primary.region import Region, create_region, open_region
from kvstrata.offload.primary.reserver import POLL_S, Pin, Reserver

SLOT_BYTES = 2 << 20


def pin_of(region: Region, rank: int) -> Pin:
    """What makes slots usable by a worker's device: nothing, on CPUs."""
    if not torch.cuda.is_available():
        return lambda slots: None
    device = CudaDevice(torch.device("cuda", rank % torch.cuda.device_count()))
    pages = torch.from_numpy(region.pages)
    return lambda slots: device.pin(pages[slots.start : slots.stop])


def worker(engine_id: str, rank: int, barrier: Barrier, spent: Synchronized[float]) -> None:
    """One worker, from the first collective of its registration on. spent: CPU seconds of all."""
    region = open_region(engine_id)
    reserver = Reserver(region, rank)
    pin = pin_of(region, rank)
    barrier.wait()
    before = time.process_time()
    reserver.reserve_first()
    barrier.wait()
    pin(range(region.progress.first_slots))
    reserver.start(pin)
    barrier.wait()  # with the parent: serving begins
    while not region.progress.complete:
        time.sleep(POLL_S)
    reserver.stop()
    with spent.get_lock():
        spent.value += time.process_time() - before


def new_region(gib: float, workers: int) -> Region:
    """A region of this size in which nothing has memory yet."""
    slots = max(workers, int(gib * 2**30 / SLOT_BYTES))
    fields = {"slots": slots, "slot_bytes": SLOT_BYTES, "workers": workers}
    return create_region(f"bench-start-{os.getpid()}", fields)


def measure(gib: float, workers: int) -> tuple[float, float, float, float]:
    """GiB that are usable when serving begins, seconds until then, seconds until all are, and the
    workers' CPU seconds."""
    region = new_region(gib, workers)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(workers + 1)
    spent = context.Value("d", 0.0)
    engine_id = f"bench-start-{os.getpid()}"
    children = [
        context.Process(target=worker, args=(engine_id, rank, barrier, spent), daemon=True)
        for rank in range(workers)
    ]
    for child in children:
        child.start()
    barrier.wait()
    region.unlink()
    began = time.perf_counter()
    barrier.wait()
    barrier.wait()
    served = time.perf_counter() - began
    first = region.progress.usable() * SLOT_BYTES / 2**30
    region.progress.serve()
    while not region.progress.complete:
        time.sleep(POLL_S)
    complete = time.perf_counter() - began
    for child in children:
        child.join()
    return first, served, complete, spent.value


def measure_at_once(gib: float) -> tuple[float, float, float]:
    """Seconds in which one thread reserves everything, in which it then touches every page, and its
    CPU seconds."""
    region = new_region(gib, 1)
    region.unlink()
    before, began = time.process_time(), time.perf_counter()
    os.posix_fallocate(region.page_region().fd, 0, region.slots * SLOT_BYTES)
    reserved = time.perf_counter()
    region.pages[:, :: os.sysconf("SC_PAGE_SIZE")] = 0
    touched = time.perf_counter()
    return reserved - began, touched - reserved, time.process_time() - before


def main(
    gib: Annotated[float, typer.Option(help="size of the CPU tier in GiB")] = 2.0,
    workers: Annotated[int, typer.Option(help="workers of the engine")] = 2,
    repeat: Annotated[int, typer.Option(help="how often all is measured")] = 3,
) -> None:
    """Print seconds, and seconds per GiB."""
    for _ in range(repeat):
        first, served, complete, spent = measure(gib, workers)
        typer.echo(
            f"{workers} workers: serving begins after {served:.2f} s with {first:.2f} GiB; all "
            f"{gib:g} GiB after {complete:.2f} s, {complete / gib:.2f} s per GiB "
            f"({spent / gib:.2f} s of CPU time)"
        )
        reserved, touched, spent = measure_at_once(gib)
        typer.echo(
            f"one thread, before serving: {reserved / gib:.2f} s per GiB to reserve, and "
            f"{touched / gib:.2f} s per GiB at the first use "
            f"({spent / gib:.2f} s of CPU time)"
        )


if __name__ == "__main__":
    typer.run(main)
