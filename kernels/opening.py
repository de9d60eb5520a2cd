"""Which pipeline a worker gets: that of the device on which its KV caches lie."""

import torch

from kvstrata.kernels.cpu import CpuPipeline, check_cpu_pipeline
from kvstrata.kernels.gpu.device import CudaDevice
from kvstrata.kernels.gpu.pipeline import GpuPipeline
from kvstrata.kernels.gpu.transport import Transport
from kvstrata.kernels.pack import prepare_triton
from kvstrata.kernels.pipeline import Groups, Pipeline


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
    (device,) = devices
    return GpuPipeline(groups, region, CudaDevice(device), prepare_triton, transport, slots, ready)
