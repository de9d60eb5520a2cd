"""The GPU's tests run without one on a stand-in: some of them here, all with `make test-gpu`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_worlds import DEVICE

HERE = Path(__file__).parents[1]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
def test_some_of_the_tests_of_a_gpu() -> None:
    """Of the copies the oracle's alone: kernels would have to be compiled."""
    order = "on_gpu/test_beside_a_model.py::test_submit_neither_allocates_nor_waits"
    compiled = "on_gpu/test_beside_a_model.py::test_nothing_is_compiled_after_the_start[None]"
    tests = ["on_gpu/test_devices.py", compiled, f"{order}[staged]", f"{order}[direct]"]
    tests += ["test_pack.py", "-k", "not copy_triton and not every_other and not beyond"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(HERE / "support"), os.environ.get("PYTHONPATH", "")]
    )
    command = [sys.executable, "-m", "pytest", "-p", "stand_in", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout, done.stdout
