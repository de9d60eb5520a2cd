"""Hits in a row on a real server: every one comes. How fast is the benchmark's business."""

import subprocess
import sys

import pytest

from tests.engine.driver import ROOT

pytestmark = pytest.mark.vllm

HITS = {"fs": 1000, "pool": 300, "object": 300, "valkey": 300, "mooncake": 300}


@pytest.mark.parametrize("tier", HITS)
def test_no_hit_is_lost(is_long: bool, tier: str) -> None:
    if not is_long:
        pytest.skip("long form")
    options = {"--tier": tier, "--hits": str(HITS[tier])}
    words = [word for option in options.items() for word in option]
    program = [sys.executable, "docs/demo/hits.py", *words]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
