"""A wrong configuration ends a server's start before any engine is started."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.driver import START_TIMEOUT_S, connector, engine_environment

pytestmark = pytest.mark.vllm


def test_a_wrong_key_is_said_before_the_model_is_loaded(llama: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(llama)),
            *("--dtype", "float32", "--skip-tokenizer-init", "--max-model-len", "256"),
            *("--kv-transfer-config", json.dumps(connector(cpu_bytes="1GiB"))),
        ],
        env=engine_environment(),
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
    )
    lines = (done.stdout + done.stderr).splitlines()
    assert done.returncode != 0
    said = [line for line in lines if "unknown key 'cpu_bytes' (did you mean" in line]
    assert len(said) == 1, lines
    assert not [line for line in lines if "EngineCore" in line], "no engine was started"
