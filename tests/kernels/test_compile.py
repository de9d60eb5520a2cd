"""The kernel compiles for real GPUs, without one, and accesses memory in the widest words."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compile_kernels.py"
# bytes that the planner proved -> how data is written
PTX = {16: ".v4.b32", 8: ".v2.b32", 1: ".b8"}
AMDGCN = {16: "dwordx4", 8: "dwordx2", 1: "byte"}


def compiled(target: tuple[str, str, str], cache: Path) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    run = subprocess.run(
        [sys.executable, SCRIPT, *target], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert {k["alignment"] for k in kernels} == set(PTX)
    return kernels


@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_nvidia(arch: str, tmp_path: Path) -> None:
    for kernel in compiled(("cuda", arch, "32"), tmp_path):
        what, assembly = (kernel["geometry"], kernel["unpack"]), kernel["assembly"]
        assert ".local" not in assembly, f"{what} spills"
        words = PTX[kernel["alignment"]]
        stores = re.findall(r"st\.global\S*", assembly)
        assert stores and all(words in store for store in stores), (what, stores)
        # the other loads are one block id, row, offset and address per job, 8 bytes each
        loads = re.findall(r"ld\.global\S*", assembly)
        others = [load for load in loads if words not in load]
        assert len(others) < len(loads) and all("b64" in load for load in others), (what, loads)


def test_amd(tmp_path: Path) -> None:
    for kernel in compiled(("hip", "gfx942", "64"), tmp_path):
        what, assembly = (kernel["geometry"], kernel["unpack"]), kernel["assembly"]
        assert "scratch_" not in assembly, f"{what} spills"
        words = AMDGCN[kernel["alignment"]]
        stores = re.findall(r"(?:global|flat|buffer)_store_\S+", assembly)
        assert stores and all(words in store for store in stores), (what, stores)
        loads = re.findall(r"(?:global|flat|buffer)_load_\S+", assembly)
        assert any(words in load for load in loads), (what, loads)
