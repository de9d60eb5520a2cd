"""The command line: exit codes, JSON to the letter, help, and the console script."""

import json
import os
import pty
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstrata.offload.cli import app
from kvstrata.tiers.base import TierContext
from kvstrata.tiers.fs import scan
from kvstrata.tiers.fs.layout import NamespacePaths
from kvstrata.tiers.fs.temporary import temporary_name
from kvstrata.tiers.testing import CONTEXT
from tests.offload.cli_world import KEYS, fill, flip, run, run_json

SCRIPT = Path(sysconfig.get_path("scripts"), "kvstrata")
PAGES = {"0": {"tokens": 32, "tensors": []}, "1": {"tokens": 64, "tensors": []}}
FIELDS = {"kv_dtype": "bfloat16", "pages": PAGES, "weights": "0123456789abcdef"}


def outcome(*arguments: object) -> tuple[int, str, str]:
    """The exit code, and what a command printed on stdout and stderr."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, result.stdout, result.stderr


# ---- ls ----


def test_ls(root: Path, paths: NamespacePaths, page: Path) -> None:
    other = fill(root, TierContext("other", FIELDS, CONTEXT.layouts))
    now = time.time()
    os.utime(page, (now - 7200, now - 7200))
    for key in KEYS[1:]:
        os.utime(paths.page(key), (now + 1000, now + 1000))  # by another host's clock
    page.with_name(temporary_name()).touch()
    Path(paths.quarantine).mkdir()
    Path(paths.quarantine, "1-checksum-x").touch()
    nbytes = sum(os.path.getsize(paths.page(key)) for key in KEYS)
    ours, theirs = run_json("ls", root)["namespaces"]
    assert 7200 <= ours.pop("oldest_age_s") < 7300
    assert ours == {
        "model": "org_model",
        "digest": paths.name[-12:],
        "path": paths.home,
        "files": 3,
        "bytes": nbytes,
        "temporary": 1,
        "quarantined": 1,
        "newest_age_s": 0.0,
        "fields": CONTEXT.namespace,
    }
    assert (theirs["path"], theirs["fields"], theirs["quarantined"]) == (other.home, FIELDS, 0)
    size = f"{nbytes / 1024:.1f} KiB"
    shown = run("ls", root).splitlines()
    assert shown[:3] == [
        f"org_model {paths.name[-12:]}",
        "    KV dtype None, tokens per chunk 16, weights None",
        f"    3 files, {size}, the oldest written 2 h ago, the newest 0 s ago; "
        "1 temporary, 1 quarantined",
    ]
    assert shown[4] == "    KV dtype bfloat16, tokens per chunk 32, 64, weights 0123456789ab"


def test_ls_without_config_or_pages(root: Path, paths: NamespacePaths) -> None:
    shutil.rmtree(paths.pages)
    os.unlink(paths.config)
    (found,) = run_json("ls", root)["namespaces"]
    ages = (found["oldest_age_s"], found["newest_age_s"])
    assert (found["files"], found["fields"], *ages) == (0, None, None, None)
    assert run("ls", root).splitlines()[1:] == [
        "    its config.json is missing or unreadable",
        "    0 files, 0 B; 0 temporary, 0 quarantined",
    ]


def test_a_root_without_namespaces(paths: NamespacePaths) -> None:
    """A namespace's own directories look like roots."""
    nothing = {"files": 0, "bytes": 0, "bad": 0, "temporary": 0, "bad_files": []}
    for misplaced in (paths.home, paths.pages):
        remedy = f"no namespaces below '{misplaced}': give the root_dir of the fs tier\n"
        assert outcome("ls", misplaced) == (0, "", f"kvstrata: {remedy}")
        assert outcome("check", misplaced) == (2, "", f"kvstrata: {remedy}")
        code, out, err = outcome("ls", misplaced, "--json")
        assert (code, json.loads(out), err) == (0, {"namespaces": []}, f"kvstrata: {remedy}")
        code, out, err = outcome("check", misplaced, "--json")
        assert (code, json.loads(out), err) == (2, nothing, f"kvstrata: {remedy}")


@pytest.mark.parametrize("content", [[], ["lost+found"]])
def test_an_empty_root_holds_nothing_bad(tmp_path: Path, content: list[str]) -> None:
    for name in content:
        (tmp_path / name).mkdir()
    said = f"kvstrata: no namespaces below '{tmp_path}'\n"
    assert outcome("ls", tmp_path) == (0, "", said)
    assert outcome("check", tmp_path) == (0, "0 files, 0 B, 0 bad, 0 temporary\n", said)


@pytest.mark.parametrize("command", ["ls", "check"])
def test_a_root_that_is_a_file(command: str, page: Path) -> None:
    assert run(command, page, exit_code=2) == f"kvstrata: '{page}': Not a directory\n"


# ---- check ----


def test_check_a_sound_root(root: Path, paths: NamespacePaths) -> None:
    nbytes = sum(os.path.getsize(paths.page(key)) for key in KEYS)
    expected = {"files": 3, "bytes": nbytes, "bad": 0, "temporary": 0, "bad_files": []}
    assert run_json("check", root) == expected
    assert run("check", root) == f"3 files, {nbytes / 1024:.1f} KiB, 0 bad, 0 temporary\n"


def test_check_names_each_bad_file(root: Path, paths: NamespacePaths, page: Path) -> None:
    flip(page, -1)
    os.truncate(paths.page(KEYS[2]), 5000)
    *lines, total = run("check", root, exit_code=1).splitlines()
    assert lines == [
        f"bad: {page}: checksum: the data is not what was written",
        f"bad: {paths.page(KEYS[2])}: truncated: 5000 bytes instead of 12368",
    ]
    assert total.endswith(" 2 bad, 0 temporary")


def test_a_page_that_an_engine_removes_meanwhile_is_not_bad(
    root: Path, page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evicted(path: str) -> scan.FileReport:
        page.unlink(missing_ok=True)
        return inspect_file(path)

    inspect_file = scan.inspect_file
    monkeypatch.setattr(scan, "inspect_file", evicted)
    assert (run_json("check", root)["files"], page.exists()) == (2, False)


def test_what_cannot_be_read_is_not_called_sound(
    root: Path, page: Path, another_user: Callable[[], AbstractContextManager[None]]
) -> None:
    for directory in (root, *root.parents):
        if directory.stat().st_uid == os.geteuid() and directory != Path("/"):
            directory.chmod(0o755)
    for path in root.rglob("*"):
        path.chmod(0o755)
    page.chmod(0)
    closed = page.parents[1]
    with another_user():
        assert run_json("inspect", page, exit_code=1)["reason"] == "unreadable: Permission denied"
    closed.chmod(0)
    with another_user():
        assert run_json("check", root, exit_code=1)["bad_files"] == [
            {"path": str(closed), "reason": "unreadable: Permission denied"}
        ]
    closed.chmod(0o755)
    root.chmod(0)
    with another_user():
        sentence = f"kvstrata: '{root}': Permission denied\n"
        assert run("check", root, exit_code=2) == run("ls", root, exit_code=2) == sentence
    root.chmod(0o755)


# ---- the console script ----


def test_the_console_script(root: Path, page: Path) -> None:
    flip(page, -1)
    done = subprocess.run([SCRIPT, "check", root], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")  # no bar: stderr is no terminal
    assert "1 bad" in done.stdout


def test_the_bar_is_shown_on_a_terminal(root: Path, paths: NamespacePaths) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    command = [str(SCRIPT), "check", str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment) as child:
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # EIO once the child has closed its end
            while part := os.read(ours, 65536):
                shown += part
        out, _ = child.communicate()
    os.close(ours)
    assert child.returncode == 0 and out.startswith(b"3 files, ")
    assert b"checking" in shown and b"25.9/25.9 kB" in shown


def test_version_and_help() -> None:
    assert run("--version") == f"kvstrata {version('kvstrata')}\n"
    shown = run("--help")
    assert all(name in shown for name in ("inspect", "ls", "check", "doctor"))
    assert "root_dir" in run("check", "--help")
    assert "Exits with 1" in run("doctor", "--help")
    assert "nonsense" in run("nonsense", exit_code=2)


def test_looking_at_files_imports_neither_torch_nor_vllm(root: Path, page: Path) -> None:
    """They take seconds."""
    script = f"""
import sys
from typer.testing import CliRunner
from kvstrata.offload.cli import app
for command in ["ls", "check"]:
    assert CliRunner().invoke(app, [command, {str(root)!r}]).exit_code == 0
assert CliRunner().invoke(app, ["inspect", {str(page)!r}]).exit_code == 0
print(*sorted({{"torch", "triton", "vllm"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr
