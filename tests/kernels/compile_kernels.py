"""A script: compile the copy kernel for GPUs that need not be there, and print what came out.

Prints one JSON line per kernel: target, geometry, direction, alignment in bytes, assembly.
Must run without TRITON_INTERPRET. Argument: the target's backend, arch and warp size.
"""

import json
import sys
from dataclasses import replace

import triton
from kernel_worlds import Model, Rank
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvstrata.kernels import pack

REAL = Model(layers=2, heads=8, tokens=16, dim=128, size=2, chunks=1)
GEOMETRIES = {
    "tokens of a head next to each other": Rank(REAL, "LBHNC", blocks=2),
    "heads of a token next to each other": Rank(REAL, "LBNHC", blocks=2),
    "layers inside blocks": Rank(REAL, "BLHNC", blocks=2),
    "K and V apart": Rank(REAL, "split-outer", blocks=2),
    "latent rows, kernel blocks": Rank(
        Model(layers=2, heads=1, tokens=64, dim=288, size=2, chunks=1),
        "BLNHC",
        blocks=2,
        kernel_blocks=2,
    ),
    "head size 96": Rank(replace(REAL, dim=96), "LBNHC", blocks=2),
    "head size 80, K and V apart": Rank(replace(REAL, dim=80), "split-inner", blocks=2),
    "three heads of size 64 in 4 bytes": Rank(
        replace(REAL, heads=3, dim=64, size=4), "LBHNC", blocks=2
    ),
    "8-byte words": Rank(Model(heads=2, tokens=16, dim=20, size=1, chunks=1), "LBNHC"),
    "bytes": Rank(Model(heads=2, tokens=16, dim=7, size=1, chunks=1), "split-inner"),
}


def main() -> None:
    backend, arch, warp = sys.argv[1:]
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp))
    for geometry, rank in GEOMETRIES.items():
        (segment,) = rank.segments
        for unpack in (False, True):
            constants = pack.kernel_constants(
                segment, segment.sets[0], segment.packed(0), segment.word_bytes, unpack=unpack
            )
            word = {1: "*u8", 2: "*i16", 4: "*i32"}[constants["WORD_BYTES"]]
            signature = dict.fromkeys(pack._copy_kernel.arg_names, "constexpr") | {
                "table": "*i64",
                "pages": word,
                "rows": "*i64",
                "ids": "*i64",
                "jobs": "i32",
                "pitch": "i32",
            }
            kernel = triton.compile(
                ASTSource(pack._copy_kernel, signature, constants),
                target=target,
                options={"num_warps": pack.NUM_WARPS, "num_stages": 1},
            )
            result = {
                "geometry": geometry,
                "unpack": unpack,
                "alignment": segment.word_bytes,
                "assembly": kernel.asm["ptx" if backend == "cuda" else "amdgcn"],
            }
            print(json.dumps(result))


if __name__ == "__main__":
    main()
