"""The GPU's tests run without one on a stand-in: some of them here, all with `make test-gpu`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_worlds import DEVICE

HERE = Path(__file__).parent


def run(*tests: str) -> str:
    """What pytest says of these tests on the stand-in."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-p", "stand_in", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
def test_some_of_the_tests_of_a_gpu() -> None:
    order = "gpu/test_order.py::test_submit_neither_allocates_nor_waits"
    compiled = "gpu/test_order.py::test_nothing_is_compiled_after_the_start[None]"
    assert "skipped" not in run("gpu/test_devices.py", compiled, order)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
def test_the_tests_of_the_copies_keep_devices_apart() -> None:
    """By the oracle: kernels would have to be compiled."""
    run("test_pack.py", "-k", "copy_torch and not every_other and not odd_sizes")
