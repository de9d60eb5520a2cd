"""A script: compile the copy kernel for GPUs that need not be there, and write down what came out.

Writes one JSON line per distinct kernel: the geometries that use it, direction, alignment in bytes,
assembly, and what the target's tools say of it.
Must run without TRITON_INTERPRET. Arguments: the target's backend, arch and warp size, the layouts
of real models joined by commas, the numbers of blocks per chunk, and the file to write.
"""

import json
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import triton
from kernel_worlds import Model, Rank
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvstrata.kernels import pack
from kvstrata.kernels.bench import models
from kvstrata.kernels.plan import Segment

REAL = Model(layers=2, heads=8, tokens=16, dim=128, size=2, chunks=1)
ODD = {
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


def table_name(model: models.Model, layout: str, blocks_per_chunk: int) -> str:
    return f"{model.name}, {layout}, {blocks_per_chunk} blocks per chunk"


def names(layouts: Sequence[str], chunks: Sequence[int]) -> set[str]:
    """Every geometry's name, the table's in these layouts with so many blocks per chunk."""
    return {*ODD, *(table_name(*one) for one in product(models.MODELS, layouts, chunks))}


def segments(layouts: Sequence[str], chunks: Sequence[int]) -> Iterator[tuple[str, Segment]]:
    """Every geometry, by name."""
    for name, rank in ODD.items():
        (segment,) = rank.segments
        yield name, segment
    for model, layout, blocks_per_chunk in product(models.MODELS, layouts, chunks):
        for group in model.groups:
            (segment,) = models.rank_caches(
                group, layout, num_blocks=2, blocks_per_chunk=blocks_per_chunk, tp=model.tp
            )
            yield table_name(model, layout, blocks_per_chunk), segment


def distinct_kernels(
    layouts: Sequence[str], chunks: Sequence[int]
) -> list[tuple[list[str], dict[str, Any]]]:
    """(names of the geometries, compile-time arguments), each set of arguments once."""
    found: dict[tuple[tuple[str, Any], ...], list[str]] = {}
    for name, segment in segments(layouts, chunks):
        for unpack in (False, True):
            constants = pack.kernel_constants(
                segment, segment.sets[0], segment.packed(0), segment.word_bytes, unpack=unpack
            )
            found.setdefault(tuple(constants.items()), []).append(name)
    return [(geometries, dict(constants)) for constants, geometries in found.items()]


def compile_kernel(constants: dict[str, Any], target: GPUTarget) -> Any:
    word = {1: "*u8", 2: "*i16", 4: "*i32"}[constants["WORD_BYTES"]]
    signature = dict.fromkeys(pack._copy_kernel.arg_names, "constexpr") | {
        "table": "*i64",
        "pages": word,
        "rows": "*i64",
        "ids": "*i64",
        "jobs": "i32",
        "pitch": "i32",
    }
    return triton.compile(
        ASTSource(pack._copy_kernel, signature, constants),
        target=target,
        options={"num_warps": pack.NUM_WARPS, "num_stages": pack.NUM_STAGES},
    )


def machine_code(cubin: bytes) -> bytes:
    """The one kernel's instructions: the section `.text.<name>` of an ELF file of 64 bits."""
    (sections,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    headers = [
        struct.unpack_from("<IIQQQQ", cubin, sections + i * size) for i in range(count)
    ]  # name, type, flags, address, offset, size
    strings = headers[names][4]
    (code,) = [
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in headers
        if cubin[strings + name :].startswith(b".text.")
    ]
    return code


def disassembled(codes: list[bytes], arch: str) -> list[list[str]]:
    """The instructions of every kernel. All at once: the tool takes long to start."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        run = subprocess.run(
            [knobs.nvidia.nvdisasm.path, "--binary", f"SM{arch}", file.name],
            capture_output=True,
            text=True,
            check=True,
        )
    lines = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.+?)\s*;", run.stdout, re.MULTILINE)
    assert len(lines) == sum(len(code) for code in codes) // 16  # bytes of an instruction
    each = iter(lines)
    return [[next(each) for _ in range(len(code) // 16)] for code in codes]


def resources(cubin: bytes) -> dict[str, int]:
    """REG (per thread), STACK, LOCAL, SHARED (bytes) of the one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        )
    return {what: int(n) for what, n in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", run.stdout)}


def main() -> None:
    backend, arch, warp, layouts, *chunks, output = sys.argv[1:]
    target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(warp))
    results = []
    cubins = []
    kinds = [layout for layout in layouts.split(",") if layout], [int(count) for count in chunks]
    for geometries, constants in distinct_kernels(*kinds):
        kernel = compile_kernel(constants, target)
        result = {
            "geometries": geometries,
            "unpack": constants["UNPACK"],
            "alignment": constants["ALIGNMENT"],
            "assembly": kernel.asm["ptx" if backend == "cuda" else "amdgcn"],
        }
        if backend == "cuda":
            cubins.append(kernel.asm["cubin"])
            result["resources"] = resources(cubins[-1])
        results.append(result)
    if backend == "cuda":
        codes = [machine_code(cubin) for cubin in cubins]
        for result, sass in zip(results, disassembled(codes, arch), strict=True):
            result["sass"] = sass
    Path(output).write_text("".join(json.dumps(result) + "\n" for result in results))


if __name__ == "__main__":
    main()
