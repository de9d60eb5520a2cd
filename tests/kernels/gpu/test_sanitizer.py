"""The kernels and copies under compute-sanitizer, where the CUDA toolkit has brought it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
SCRIPT = Path(__file__).parent / "sanitized.py"
TOOL = shutil.which("compute-sanitizer") or shutil.which(
    "compute-sanitizer", path="/usr/local/cuda/bin"
)


@pytest.mark.skipif(TOOL is None, reason="needs compute-sanitizer, of the CUDA toolkit")
@pytest.mark.parametrize(
    ("check", "summary"),
    [("memcheck", "ERROR SUMMARY: 0 errors"), ("racecheck", "RACECHECK SUMMARY: 0 hazards")],
)
def test_nothing_is_found(check: str, summary: str) -> None:
    # calls that return errors on purpose are no finding: torch and Triton probe a lot
    options = ["--tool", check, "--error-exitcode", "86"]
    if check == "memcheck":
        options += ["--report-api-errors", "no"]
    run = subprocess.run(
        [TOOL, *options, sys.executable, str(SCRIPT)],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert summary in run.stdout, run.stdout[-4000:]
