"""Pages of hundreds of MiB there and back, by every transport, in every layout."""

import ctypes

import pytest
from device_checks import ALL, Machine, check_round_trip, real
from kernel_worlds import DEVICE, FULL_SIZE, Model

from kvstrata.kernels.gpu import device as device_module
from kvstrata.kernels.gpu.device import CudaDevice
from kvstrata.kernels.gpu.memcpy import Driver, _one_by_one, drivers
from kvstrata.kernels.gpu.transport import Transport
from kvstrata.kernels.pack import prepare_triton

pytestmark = pytest.mark.gpu
TRANSPORTS = pytest.mark.parametrize("transport", Transport)
# Llama-3-8B in pages of 4 blocks, 8 MiB: 256 MiB of pages, and caches of twice that
CHUNKS, LAYERS = (32, 32) if FULL_SIZE else (5, 2)
LLAMA = Model(LAYERS, heads=8, tokens=16, dim=128, size=2, chunks=CHUNKS, blocks_per_chunk=4)


@TRANSPORTS
@pytest.mark.parametrize("layout", ALL)
def test_every_layout(transport: Transport, layout: str) -> None:
    check_round_trip(real(), LLAMA, layout, transport, blocks=256)


def test_a_region_of_several_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels reach over all of them from the address of the first."""
    monkeypatch.setattr(device_module, "_MAX_PINNED_RUN", 48 << 20)
    for transport in Transport:
        check_round_trip(real(), LLAMA, "LBHNC", transport, blocks=256)


@pytest.mark.parametrize("transport", [Transport.STAGED, Transport.DIRECT])
@pytest.mark.parametrize("name", ["cuMemcpyBatchAsync", "cuMemcpyAsync"])
def test_both_copy_functions(name: str, transport: Transport) -> None:
    driver = next(drivers())
    if name == "cuMemcpyAsync":
        driver = Driver(name, _one_by_one(ctypes.CDLL("libcuda.so.1").cuMemcpyAsync, []))
    if driver.name != name:
        pytest.skip(f"this driver has no {name}")
    device = CudaDevice(DEVICE)
    device.driver = driver
    machine = Machine(device, DEVICE, prepare_triton)
    check_round_trip(machine, LLAMA, "BLHNC", transport, blocks=256)
