"""The README's way from nothing to a hit, on a real server, by its own commands."""

import json
import re
from pathlib import Path

import pytest

from tests.docs.blocks import shell_commands
from tests.docs.known import way_of
from tests.engine.driver import ROOT
from tests.engine.reader import Reader, form
from tests.waiting import wait_until

pytestmark = pytest.mark.vllm

PAGES = 8  # of 1,091 characters, each a token of the tiny model, in vLLM's CPU blocks of 128


def test_from_nothing_to_a_hit(llama: Path, root: Path, tmp_path: Path) -> None:
    shown = [
        command
        for command in shell_commands([ROOT / "README.md"])
        if (way := way_of(command)) is not None and way.how == "served"
    ]
    exports = [each.text for each in shown if each.text.startswith("export ")]
    (serve,) = [each.text for each in shown if each.text.startswith("python -m vllm.")]
    cold, warm, metrics, wishes = (each for each in shown if each.text.startswith("curl "))
    (model,) = re.findall(r'model_name="([^"]*)"', metrics.printed)

    reader = Reader(llama, root, tmp_path / "server.log")
    for command in exports:
        reader.export(command)
    root.mkdir(0o700)
    with reader.serving(serve):
        printed = reader.run(cold.text)
        assert printed == cold.printed
        wait_until(lambda: len(list(root.rglob("*.safetensors"))) >= PAGES)
    with reader.serving(serve):
        printed = reader.run(warm.text)
        assert form(printed, str(llama)) == form(warm.printed, model)
        cached = int(printed.rpartition(":")[2])
        assert cached == PAGES * 128
        assert form(reader.run(metrics.text), str(llama)) == form(metrics.printed, model)
        # the statistics of an engine's last step come after the answer
        wait_until(lambda: float(reader.run(metrics.text).split()[-1]) == cached)
        answer = json.loads(reader.run(wishes.text))
        assert answer["choices"], answer
    assert "kv_transfer_params" not in reader.log.read_text()  # a wish that is ignored is logged
