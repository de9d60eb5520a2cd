"""The kernels and copies under compute-sanitizer, where the CUDA toolkit has brought it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "sanitized.py"
TOOL = shutil.which("compute-sanitizer") or shutil.which(
    "compute-sanitizer", path="/usr/local/cuda/bin"
)


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(TOOL is None, reason="needs compute-sanitizer, of the CUDA toolkit"),
]


def test_memory() -> None:
    # calls that return errors on purpose are no finding: torch and Triton probe a lot
    check("memcheck", "ERROR SUMMARY: 0 errors", "--report-api-errors", "no")


def test_races() -> None:
    check("racecheck", "RACECHECK SUMMARY: 0 hazards")


def check(tool: str, summary: str, *options: str) -> None:
    command = [TOOL, "--tool", tool, "--error-exitcode", "86", *options]
    run = subprocess.run(
        [*command, sys.executable, str(SCRIPT)],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert summary in run.stdout, run.stdout[-4000:]
