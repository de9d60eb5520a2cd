"""The GPU tests' checks on a simulated device: they pass where all is well, and see what is not."""

from collections.abc import Callable

import pytest
from device_checks import (
    ALL,
    check_loads_under_a_running_model,
    check_round_trip,
    check_stores_under_a_running_model,
    simulated,
)
from kernel_worlds import Model
from traffic import Traffic

from kvstrata.kernels.gpu import pipeline as gpu
from kvstrata.kernels.gpu.pipeline import GpuPipeline
from kvstrata.kernels.gpu.transport import Transport

MODEL = Model(layers=2, heads=4, tokens=2, dim=4, chunks=5)
BYTES = Model(layers=2, heads=2, tokens=2, dim=4, size=1, chunks=3)
TRANSPORTS = pytest.mark.parametrize("transport", Transport)
ANY = pytest.mark.parametrize("transport", [None, *Transport])


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "STAGING_SIZES", (2 * MODEL.page_bytes, 4 * MODEL.page_bytes))
    monkeypatch.setattr(gpu, "MAX_BATCH", 2)
    monkeypatch.setattr(gpu, "RING_ROUNDS", 0)


@TRANSPORTS
@pytest.mark.parametrize("layout", ALL)
@pytest.mark.parametrize("tp", [1, 2])
def test_round_trips(transport: Transport, layout: str, tp: int) -> None:
    check_round_trip(simulated(), MODEL, layout, transport, blocks=20, tp=tp, expedited=tp == 2)


@ANY
def test_stores(transport: Transport | None) -> None:
    check_stores_under_a_running_model(simulated(), BYTES, "LBHNC", transport, rounds=5)


@ANY
def test_loads(transport: Transport | None) -> None:
    for expedited in (False, True):
        check_loads_under_a_running_model(
            simulated(), BYTES, "BLNHC", transport, rounds=5, expedited=expedited
        )


@ANY
def test_traffic(transport: Transport | None) -> None:
    for seed in range(5):
        traffic = Traffic(simulated(seed), BYTES, blocks=60, slots=30, seed=seed)
        traffic.run(100, transport)
        assert traffic.most_under_way > 5


def stores(seed: int) -> None:
    check_stores_under_a_running_model(simulated(seed), BYTES, "LBHNC", None, rounds=5)


def loads(seed: int) -> None:
    check_loads_under_a_running_model(
        simulated(seed), BYTES, "LBHNC", None, rounds=5, expedited=False
    )


def traffic(seed: int) -> None:
    Traffic(simulated(seed), BYTES, blocks=60, slots=30, seed=seed).run(100, None)


@pytest.mark.parametrize("check", [stores, loads, traffic])
def test_a_fence_that_does_nothing_is_seen(
    check: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GpuPipeline, "fence", lambda self, job_ids: None)
    with pytest.raises(AssertionError):
        for seed in range(5):
            check(seed)
