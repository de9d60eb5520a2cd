"""The same for many ranks, latent rows, odd sizes, and distances beyond 2^31."""

import pytest
import torch
from device_checks import check_round_trip, real
from kernel_worlds import DEVICE, FULL_SIZE, Model

from kvstrata.kernels.gpu.transport import Transport

pytestmark = pytest.mark.gpu
TRANSPORTS = pytest.mark.parametrize("transport", Transport)
CHUNKS, LAYERS = (32, 32) if FULL_SIZE else (5, 2)
# Llama-3-8B in pages of 4 blocks
LLAMA = Model(LAYERS, heads=8, tokens=16, dim=128, size=2, chunks=CHUNKS, blocks_per_chunk=4)
LATENT = Model(layers=61, heads=1, tokens=64, dim=288, size=2, chunks=CHUNKS, blocks_per_chunk=1)
ODD = Model(3, heads=3, tokens=8, dim=33, size=1, chunks=CHUNKS**2 * 2, blocks_per_chunk=3)
GIB = 1 << 30


@TRANSPORTS
@pytest.mark.parametrize("expedited", [False, True])
def test_eight_ranks(transport: Transport, expedited: bool) -> None:
    check_round_trip(real(), LLAMA, "LBNHC", transport, blocks=256, tp=8, expedited=expedited)


@TRANSPORTS
def test_latent_rows(transport: Transport) -> None:
    check_round_trip(real(), LATENT, "BLNHC", transport, blocks=64, other="LBHNC", other_tp=1)


@TRANSPORTS
@pytest.mark.parametrize("shift", [0, 1])
def test_odd_sizes_and_addresses(transport: Transport, shift: int) -> None:
    check_round_trip(real(), ODD, "LBNHC", transport, blocks=12_000, shift=shift)


@TRANSPORTS
@pytest.mark.parametrize("layout", ["LHBNC", "split-outer"])
@pytest.mark.parametrize("shift", [0, 1])
def test_caches_of_more_than_2_to_the_31(transport: Transport, layout: str, shift: int) -> None:
    """Distances in a layer pass 2^31 bytes; with shift 1, when words are bytes, 2^31 words."""
    model = Model(layers=1, heads=2, tokens=16, dim=128, size=1, chunks=8, blocks_per_chunk=4)
    blocks = 6 * GIB // (2 * 16 * 256)
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info(DEVICE)[0] < 24 * GIB:
        pytest.skip("needs 24 GiB of GPU memory")
    ends = torch.cat((torch.arange(16), torch.arange(blocks - 16, blocks))).flip(0)
    ids = ends.view(model.chunks, model.blocks_per_chunk).contiguous()
    world = {"blocks": blocks, "ids": ids, "shift": shift}
    check_round_trip(real(), model, layout, transport, **world, other="LHBNC", other_tp=1)
    torch.cuda.empty_cache()
