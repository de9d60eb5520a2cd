"""The sessions of docs/simulate.md print what they show."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstrata.offload.cli.main import app
from kvstrata.offload.simulate.generate import main as generate
from tests.docs.blocks import ROOT, Command, shell_commands
from tests.docs.known import way_of

DOCUMENT = ROOT / "docs/simulate.md"


def simulated() -> Sequence[Command]:
    """In the order of the document."""
    found = shell_commands([DOCUMENT])
    return [each for each in found if (way := way_of(each)) and way.how == "simulated"]


def test_the_sessions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = simulated()
    assert len(commands) >= 3
    for command in commands:
        words = command.words
        if words[0] == "python":
            *arguments, arrow, path = words[3:]
            assert arrow == ">"
            generate(arguments)
            Path(path).write_text(capsys.readouterr().out)
            continue
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"{command.where}: {result.output}"
        assert result.stdout == command.printed, command.where
