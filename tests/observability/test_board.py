"""The dashboard can be imported as it is, and read."""

import itertools
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.docs.blocks import ROOT, shell_commands
from tests.observability.queries import BOARD, board, panels

COLUMNS = 24  # Grafana's
PANELS = list(panels())


def title(panel: dict[str, Any]) -> str:
    return str(panel["title"])


def test_the_file_is_kept_in_one_form() -> None:
    """So that a change shows as what it is, also one that was made in Grafana and exported."""
    text = json.dumps(board(), indent=2, ensure_ascii=False)
    assert BOARD.read_text() == f"{text}\n"


def test_it_is_no_wall() -> None:
    assert 20 <= len(PANELS) <= 28


def test_it_can_be_imported_as_it_is() -> None:
    """Grafana gives it a number; what it asks of is chosen on the board."""
    assert "id" not in board() and "__inputs" not in board()
    names = [each["name"] for each in board()["templating"]["list"]]
    assert names == ["datasource", "model_name", "engine", "tier"]
    sources = re.findall(r'"uid": "(.*?)"', BOARD.read_text())
    assert set(sources) == {"kvstrata", "${datasource}"}
    numbers = [panel["id"] for panel in board()["panels"]]
    assert len(set(numbers)) == len(numbers)


def test_what_the_document_sends_to_grafana(tmp_path: Path) -> None:
    """The commands of docs/board.md, with a `curl` that keeps what it is to send."""
    curl = tmp_path / "curl"
    curl.write_text('#!/bin/bash\n[ "${@: -1}" = @- ] && cat || echo "${@: -1}"\n')
    curl.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    sent = []
    for command in shell_commands([ROOT / "docs" / "board.md"]):
        if "localhost:3000/api" in command.text:
            done = subprocess.run(
                ["bash", "-euc", command.text],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                check=True,
            )
            sent.append(json.loads(done.stdout))
    source, dashboard = sent
    assert source["type"] == "prometheus"
    assert dashboard == {"overwrite": True, "dashboard": board()}


def test_nothing_overlaps() -> None:
    places = [panel["gridPos"] for panel in board()["panels"]]
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert all(x < COLUMNS for x, _ in cells)


@pytest.mark.parametrize("panel", PANELS, ids=title)
def test_a_panel_explains_itself(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".") and len(panel["description"]) > 80
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert panel["type"] == "state-timeline" or panel["fieldConfig"]["defaults"]["unit"]
    for target, letter in zip(panel["targets"], itertools.count(ord("A"))):
        assert target["refId"] == chr(letter) and target["legendFormat"]


@pytest.mark.parametrize("panel", PANELS, ids=title)
def test_a_panel_obeys_the_variables(panel: dict[str, Any]) -> None:
    """All series are of the chosen models, engines and, where they are told of tiers, tiers."""
    for target in panel["targets"]:
        found = re.findall(r"\b((?:kvstrata_|vllm:)\w+)\{([^}]*)\}", target["expr"])
        assert len(found) == len(re.findall(r"\bkvstrata_|\bvllm:", target["expr"]))
        for name, labels in found:
            assert labels.startswith('model_name=~"$model_name", engine=~"$engine"')
            if name.startswith(("kvstrata_tier_", "kvstrata_promotion_seconds")):
                assert 'tier=~"$tier"' in labels
        for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
            assert re.search(rf"by \([^)]*\b{label}\b", target["expr"])
