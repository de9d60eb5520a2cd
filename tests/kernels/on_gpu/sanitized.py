"""A script for compute-sanitizer: every transport, word size and direction, small.

The caching allocator must be off, so that every tensor is an allocation of its own.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

from device_checks import check_round_trip, check_stores_under_a_running_model, real
from kernel_worlds import Model

from kvstrata.kernels.gpu.transport import Transport

WIDE = Model(layers=2, heads=4, tokens=16, dim=64, size=2, chunks=4)
ODD = Model(layers=2, heads=3, tokens=4, dim=7, size=1, chunks=4)
BYTES = Model(layers=2, heads=2, tokens=16, dim=64, size=1, chunks=4)


def main() -> None:
    for transport in Transport:
        for layout in ("LBHNC", "LBNHC", "split-inner"):
            check_round_trip(real(), WIDE, layout, transport, blocks=10, tp=2)
        check_round_trip(real(), ODD, "LBNHC", transport, blocks=10, shift=1, other="LHBNC")
        check_stores_under_a_running_model(real(), BYTES, "LBHNC", transport, rounds=2)


if __name__ == "__main__":
    main()
