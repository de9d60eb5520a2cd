"""`kvstrata doctor --config`: a whole configuration, judged without vLLM."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvstrata.offload.cli.main import app
from tests.tiers.pool.pool_world import own_shm, pool_dir

GOOD = {"spec_name": "KVStrataSpec", "cpu_bytes_to_use": "1MiB"}


def doctor(config: object) -> tuple[int, dict[str, Any]]:
    text = config if isinstance(config, str) else json.dumps(config)
    result = CliRunner().invoke(app, ["doctor", "--json", "--config", text])
    return result.exit_code, json.loads(result.stdout)


def problems(config: object) -> dict[str, str]:
    code, found = doctor(config)
    wrong = {c["name"]: c["meaning"] for c in found["checks"] if c["status"] == "problem"}
    assert (code, found["ok"]) == ((1, False) if wrong else (0, True))
    return wrong


def test_a_good_one(tmp_path: Path) -> None:
    roots = [str(tmp_path / "a"), str(tmp_path / "b")]
    config = {**GOOD, "backpressure": {}, "secondary_tiers": [{"type": "fs", "root_dir": roots}]}
    code, found = doctor(config)
    assert (code, found["ok"]) == (0, True)
    checks = [(check["name"], check["found"]) for check in found["checks"]]
    assert ("backpressure", "does nothing here") in checks
    assert [value for name, value in checks if name == "fs"] == roots
    assert os.listdir(tmp_path) == []
    inner = {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": config}
    other = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
    several = {"connectors": [other, inner]}
    multi = {"kv_connector": "MultiConnector", "kv_connector_extra_config": several}
    for around in (inner, {"kv_connector_extra_config": config}, multi):
        again = doctor(around)[1]["checks"]  # what is free may be other than before
        assert [(check["name"], check["status"]) for check in again] == [
            (check["name"], check["status"]) for check in found["checks"]
        ]


def test_in_words(tmp_path: Path) -> None:
    def last_line(config: object) -> str:
        result = CliRunner().invoke(app, ["doctor", "--config", json.dumps(config)])
        return result.stdout.splitlines()[-1]

    assert last_line(GOOD) == "this configuration works here"
    wrong = {**GOOD, "pin": 1}
    assert last_line(wrong) == "this configuration does not work here: configuration"


@pytest.mark.parametrize(
    ("config", "name", "words"),
    [
        ("{'a': 1}", "configuration", "this is no JSON"),
        ("[]", "configuration", "this is no object"),
        ("{}", "configuration", "cpu_bytes_to_use is missing"),
        (
            {"kv_connector": "SimpleCPUOffloadConnector", "kv_connector_extra_config": GOOD},
            "configuration",
            "kv_connector: 'SimpleCPUOffloadConnector' does not use kvstrata",
        ),
        (
            {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": [{}]}},
            "configuration",
            "no connector of the MultiConnector",
        ),
        ({**GOOD, "cpu_bytes": 1}, "configuration", "did you mean 'cpu_bytes_to_use'?"),
        ({**GOOD, "cpu_bytes_to_use": "60TiB"}, "cpu_bytes_to_use", "this machine's memory"),
        ({"cpu_bytes_to_use": "1MiB"}, "spec_name", '"spec_name": "KVStrataSpec"'),
        (
            {**GOOD, "spec_name": "TieringOffloadingSpec"},
            "spec_name",
            'give "spec_name": "KVStrataSpec"',
        ),
        (
            {**GOOD, "secondary_tiers": [{"type": "fs", "root_dir": "/dev/null/kv"}]},
            "files",
            "cannot be made: '/dev/null' is not a directory",
        ),
        ({**GOOD, "record": "/nosuch/requests"}, "record", "there is no directory '/nosuch'"),
    ],
)
def test_what_is_wrong(config: object, name: str, words: str) -> None:
    found = problems(config)
    assert list(found) == [name]
    assert words in found[name]


def test_a_pool_must_fit() -> None:
    with own_shm() as shm:
        entry = {"type": "pool", "name": "node", "max_bytes": "64MiB"}
        config = {**GOOD, "secondary_tiers": [entry]}
        assert problems(config) == {} and os.listdir(shm) == []
        entry["max_bytes"] = "900TiB"
        found = problems(config)
        assert list(found) == ["pool memory"]
        assert found["pool memory"].startswith("max_bytes: 900.0 TiB do not fit")
        entry["max_bytes"] = "64MiB"
        pool_dir(shm).symlink_to(shm)
        assert "is a symbolic link" in problems(config)["pool memory"]


def test_without_vllm() -> None:
    code = (
        "import sys; sys.modules['vllm'] = sys.modules['torch'] = None\n"
        "from kvstrata.offload.cli.main import main\n"
        f"sys.argv = ['kvstrata', 'doctor', '--config', {json.dumps(json.dumps(GOOD))}]\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
