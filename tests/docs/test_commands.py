"""Every shell command of the documentation is run, or listed in `known.py` with the reason."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstrata.offload.cli.main import app
from kvstrata.offload.config.offload_config import parse_config
from kvstrata.offload.request.parameters import NO_PARAMETERS, ParameterReader
from kvstrata.tiers.fs.files.trust import distrust
from kvstrata.tiers.testing import CONTEXT
from tests.docs.blocks import DOCUMENTS, ROOT, SHELL, Block, Command, blocks, shell_commands
from tests.docs.known import WAYS, way_of
from tests.offload.cli.cli_world import KEYS, fill
from tests.offload.cli.server.server_world import FakeServer, healthy
from tests.spoiling import flip

COMMANDS = shell_commands()
LANGUAGES = {*SHELL, "json", "python", "text", "yaml"}


def of(how: str, start: str = "") -> list[Command]:
    """The commands that are tested in this way."""
    found = [
        command for command in COMMANDS if (way := way_of(command)) is not None and way.how == how
    ]
    return [command for command in found if command.text.startswith(start)]


def where(command: Command) -> str:
    return command.where


def test_every_command_is_run_or_listed() -> None:
    unknown = [f"{each.where}: {each.text}" for each in COMMANDS if way_of(each) is None]
    assert unknown == [], "run it in a test, or list it in tests/docs/known.py"


def test_no_way_is_left_over() -> None:
    used = {way_of(command) for command in COMMANDS}
    assert [way.pattern for way in WAYS if way not in used] == []
    assert all(way.why for way in WAYS if way.how not in ("run", "served"))


def test_every_fence_says_its_language() -> None:
    """Else it might hold commands that nobody runs."""
    found = [block for path in DOCUMENTS for block in blocks(path)]
    assert [block.where for block in found if block.language not in LANGUAGES] == []


# ---- commands that are run ----


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A root with two namespaces, a bad page in the quarantine, and one namespace out of service.

    Also what the documents say in place of its names.
    """
    root = tmp_path_factory.mktemp("docs") / "root"
    paths = fill(root)
    other = fill(root, replace(CONTEXT, namespace={**CONTEXT.namespace, "another": 1}))
    page = Path(paths.page(KEYS[0]))
    bad = Path(paths.quarantine, f"1-checksum-{page.name}")
    bad.parent.mkdir()
    bad.write_bytes(page.read_bytes())
    flip(bad, -1)
    distrust(paths, 0o600)
    return root, {
        "/mnt/kv/org_model_9a0e0ab15cf5_r0/quarantine/*": str(bad),
        "/mnt/kv": str(root),
        '"$KV"': str(root),
        "ROOT": str(root),
        "FILE": str(page),
        "NAMESPACE NAMESPACE": f"{paths.name} {other.name}",
        "NAMESPACE": paths.name,
        "9a0e 3a23": f"{paths.name[-12:]} {other.name[-12:]}",
    }


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    """One of which nothing is wrong."""
    with FakeServer(healthy().text()) as server:
        yield server


@pytest.mark.parametrize("command", of("run", "kvstrata"), ids=where)
def test_kvstrata(
    command: Command,
    filled: tuple[Path, dict[str, str]],
    server: FakeServer,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvstrata.offload.cli.server.doctor.sleep", lambda seconds: None)
    shutil.copytree(filled[0], root, symlinks=True)
    text = re.sub(r"http://localhost:800\d", server.url, command.text)
    for shown, used in filled[1].items():
        text = text.replace(shown, used.replace(str(filled[0]), str(root)))
    arguments = shlex.split(text, comments=True)[1:]
    result = CliRunner().invoke(app, arguments)
    bad_is_shown = arguments[0] == "inspect" and "quarantine" in text
    one_is_left_out = arguments[0] == "copy"
    assert result.exit_code == (1 if bad_is_shown or one_is_left_out else 0), result.output
    assert result.stdout
    # what a session shows has the names that are printed, whatever their values
    assert _labels(command.printed) <= _labels(result.stdout)


def _labels(printed: str) -> set[str]:
    return set(re.findall(r"^([a-z][a-z ]{1,10}[a-z]) {2,}", printed, re.M))


@pytest.mark.parametrize("command", of("run", "sudo install"), ids=where)
def test_the_directory_is_made_for_its_user(command: Command, tmp_path: Path) -> None:
    text = re.sub(r"(?<= )/\S+$", str(tmp_path / "kv"), command.text.removeprefix("sudo "))
    text = re.sub(r"-o (vllm|2000)", '-o "$USER"', text)
    environment = os.environ | {"USER": str(os.geteuid())}
    subprocess.run(["bash", "-euc", text], check=True, env=environment)
    stat = (tmp_path / "kv").stat()
    assert (stat.st_mode & 0o7777, stat.st_uid) == (0o700, os.geteuid())


def test_the_digests_of_sparse_files(tmp_path: Path) -> None:
    """docs/weights.md, with smaller files."""
    shown = [each.text for each in of("run") if "/tmp/sparse" in each.text]
    assert len(shown) == 3
    script = "\n".join(shown).replace("/tmp/sparse", str(tmp_path / "sparse"))
    assert "5000000000" in script
    script = script.replace("5000000000", "5000").replace("python", sys.executable, 1)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        ["bash", "-euc", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "sparse").iterdir())) == 20


# ---- commands of which something is checked ----


@pytest.mark.parametrize("command", of("make"), ids=where)
def test_make_knows_the_target_and_the_variables(command: Command) -> None:
    makefile = (ROOT / "Makefile").read_text()
    words = shlex.split(command.text.replace("[", "").replace("]", ""), comments=True)
    for name in (word.partition("=")[0] for word in words[1:] if "=" in word):
        assert f"$({name})" in makefile
    done = subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", of("options"), ids=where)
def test_a_program_knows_its_options(command: Command) -> None:
    given = 3 if command.words[1] == "-m" else 2
    program, options = command.words[1:given], command.words[given:]
    done = subprocess.run(
        [sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    for option in options:
        assert not option.startswith("--") or option in done.stdout


# ---- JSON ----


def json_blocks() -> list[Block]:
    return [b for path in DOCUMENTS for b in blocks(path) if b.language == "json"]


@pytest.mark.parametrize("block", json_blocks(), ids=lambda block: block.where)
def test_json_is_accepted(block: Block) -> None:
    """A whole object, or a member of one."""
    text = block.text.strip()
    shown = json.loads(text if text.startswith("{") else f"{{{text}}}")
    extra = shown.get("kv_connector_extra_config", shown)
    if "spec_name" in extra or "secondary_tiers" in extra:
        parse_config({"cpu_bytes_to_use": "1GiB", **extra})
    if params := shown.get("kv_transfer_params"):
        reader = ParameterReader(["fs"])
        wishes = reader.read(params)
        assert reader.wrong == 0
        assert "kvstrata" not in params or wishes != NO_PARAMETERS
