"""vLLM's own `p2p` between two of our managers: pages go from one CPU tier into another's.

Over NIXL and UCX, which need no GPU: `pip install --no-deps nixl nixl-cu12`.
"""

import importlib.util
import json
import subprocess
import sys

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

PROGRAM = "tests.offload.vllm_plugin.foreign_tiers.p2p_nodes"
SECONDS = 600  # only a fault meets it


@pytest.mark.skipif(
    importlib.util.find_spec("nixl") is None, reason="pip install --no-deps nixl nixl-cu12"
)
def test_pages_go_between_two_nodes(pytestconfig: pytest.Config) -> None:
    done = subprocess.run(
        [sys.executable, "-m", PROGRAM],
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "peer": ["right", "right", "miss"],
        "prefiller": ["right"] * 3,
        "returned": ["2"],
        "another namespace": ["miss"] * 3,
    }
