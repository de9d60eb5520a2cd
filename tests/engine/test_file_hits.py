"""File hits in a row on a real server: every one comes. How fast is the benchmark's business."""

import subprocess
import sys

import pytest

from tests.engine.driver import ROOT

pytestmark = pytest.mark.vllm


def test_no_file_hit_is_lost(is_long: bool) -> None:
    if not is_long:
        pytest.skip("long form")
    program = [sys.executable, "docs/demo/file_hits.py", "--hits", "1000"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
