"""The kernel compiles for real GPUs, without one: wide accesses, no spills, few registers.

Checked for the geometries of real models in every layout and for odd ones, on the assembly and, for
NVIDIA, on the machine code that Triton's own tools make of it.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from compile_kernels import ODD, names

from kvstrata.kernels.bench.models import LAYOUTS

SCRIPT = Path(__file__).parent / "support" / "compile_kernels.py"
TARGETS = {
    "sm_80": ("cuda", "80", "32"),
    "sm_90": ("cuda", "90", "32"),
    "sm_100": ("cuda", "100", "32"),
    "gfx942": ("hip", "gfx942", "64"),
}
CHUNKS = ("1", "4", "16")  # blocks per chunk
# bytes that the planner proved -> how data is read and written
PTX = {16: ".v4.b32", 8: ".v2.b32", 1: ".b8"}
SASS = {16: "E.128", 8: "E.64", 1: "E.U8"}
AMDGCN = {16: "dwordx4", 8: "dwordx2", 1: "byte"}
# Per thread, so that four warps take an eighth of an NVIDIA SM's at most: 65,536 / (8 x 128).
MAX_REGISTERS = 64

Kernel = dict[str, Any]


@pytest.fixture(scope="module")
def outputs(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[dict[str, subprocess.Popen]]:
    """A running compiler per target, all at once. Real models on one, and on each with --long, as
    are all chunk sizes: these only change how far apart the same accesses are.
    """
    every = pytestconfig.getoption("--long")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    running = {
        name: subprocess.Popen(
            [
                *(sys.executable, SCRIPT, *arguments),
                ",".join(LAYOUTS if every or name == "sm_90" else ()),
                *(CHUNKS if every else CHUNKS[1:2]),
                tmp_path_factory.mktemp(name) / "kernels",
            ],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, arguments in TARGETS.items()
    }
    yield running
    for process in running.values():
        process.kill()
        process.wait()


def compiled(process: subprocess.Popen) -> list[Kernel]:
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    lines = Path(process.args[-1]).read_text().splitlines()
    kernels = [json.loads(line) for line in lines]
    layouts, *chunks = process.args[5:-1]
    there = {(name, k["unpack"]) for k in kernels for name in k["geometries"]}
    wanted = names(list(filter(None, layouts.split(","))), [int(count) for count in chunks])
    assert there == set(product(wanted, (False, True)))
    assert {k["alignment"] for k in kernels} == set(PTX)
    for kernel in kernels:
        if any(name not in ODD for name in kernel["geometries"]):
            assert kernel["alignment"] == 16, kernel["geometries"]
    return kernels


def check_widths(stores: list[str], loads: list[str], words: str, metadata: str) -> None:
    """All stores and all loads but four are of `words`: a tile's block id, row, offset and address.

    A narrower access to data would be there twice as often, at least four times more.
    """
    assert stores and all(words in store for store in stores), stores
    others = [load for load in loads if words not in load]
    assert len(others) < len(loads) and len(others) <= 4, loads
    assert all(re.search(metadata, load) for load in others), loads


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_nvidia(target: str, outputs: dict[str, subprocess.Popen]) -> None:
    for kernel in compiled(outputs[target]):
        where, ptx, sass = kernel["geometries"][0], kernel["assembly"], "\n".join(kernel["sass"])
        assert ".local" not in ptx and not re.search(r"\b(LDL|STL)\b", sass), f"{where} spills"
        used = kernel["resources"]
        assert used["STACK"] == used["LOCAL"] == 0, f"{where} spills"
        assert 0 < used["REG"] <= MAX_REGISTERS, (where, used)
        alignment = kernel["alignment"]
        ptx_stores, ptx_loads = (re.findall(rf"{op}\.global\S*", ptx) for op in ("st", "ld"))
        check_widths(ptx_stores, ptx_loads, PTX[alignment], r"b64$")
        stores, loads = (re.findall(rf"\b{op}\.\S*", sass) for op in ("STG", "LDG"))
        check_widths(stores, loads, SASS[alignment], r"E\.64$")


def test_amd(outputs: dict[str, subprocess.Popen]) -> None:
    for kernel in compiled(outputs["gfx942"]):
        where, assembly = kernel["geometries"][0], kernel["assembly"]
        numbers = dict(re.findall(r"^\s*\.(\w+):\s+(\d+)$", assembly, re.MULTILINE))
        assert "scratch_" not in assembly, f"{where} spills"
        for what in ("private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count"):
            assert numbers[what] == "0", (where, what)
        assert 0 < int(numbers["vgpr_count"]) <= MAX_REGISTERS, (where, numbers)
        stores, loads = (
            re.findall(rf"\b(?:global|flat|buffer)_{op}_\S+", assembly) for op in ("store", "load")
        )
        check_widths(stores, loads, AMDGCN[kernel["alignment"]], r"dwordx[24]$")
