"""The command line: exit codes, JSON to the letter, help, and the console script."""

import json
import os
import pty
import shutil
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import pytest

from kvstrata.tiers.base import TierContext
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.files.temporary import temporary_name
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.testing import CONTEXT, make_data, store
from tests.offload.cli.cli_world import KEYS, fill, outcome, run, run_json
from tests.spoiling import flip
from tests.waiting import wait_until

SCRIPT = Path(sysconfig.get_path("scripts"), "kvstrata")
PAGES = {"0": {"tokens": 32, "tensors": []}, "1": {"tokens": 64, "tensors": []}}
FIELDS = {"kv_dtype": "bfloat16", "pages": PAGES, "weights": "0123456789abcdef"}


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
    listed = run_json("ls", root)
    ours, theirs = listed["namespaces"]
    assert 7200 <= ours.pop("oldest_age_s") < 7300
    assert 0 <= ours.pop("used_age_s") < 600
    assert ours == {
        "model": "org_model",
        "digest": paths.name[-12:],
        "path": paths.home,
        "config": None,
        "files": 3,
        "bytes": nbytes,
        "share": 0.5,
        "temporary": 1,
        "quarantined": 1,
        "trusted": True,
        "newest_age_s": 0.0,
        "fields": CONTEXT.namespace,
    }
    assert (theirs["path"], theirs["fields"], theirs["quarantined"]) == (other.home, FIELDS, 0)
    books = listed["books"]
    assert books["counted"] and books["files"] >= 6 and books["bytes"] > 2 * nbytes
    assert books["free_bytes"] > 0 and not books["reserved_bytes"]
    names = ("max_bytes", "max_files", "min_free_bytes", "servers", "keeper", "damage")
    assert [books[name] for name in names] == [None, None, None, 0, None, []]
    size = f"{nbytes / 1024:.1f} KiB"
    first, *shown = run("ls", root).splitlines()
    assert first.startswith(f"{root}: {books['files']} files, ") and first.endswith("; 0 members")
    assert shown[:2] == [
        f"org_model {paths.name[-12:]}",
        "    KV dtype None, tokens per chunk 16, weights None",
    ]
    start = f"    3 files, {size} (50%), the oldest written 2 h ago, the newest 0 s ago, used "
    assert shown[2].startswith(start) and shown[2].endswith(" ago; 1 temporary, 1 quarantined")
    assert shown[4] == "    KV dtype bfloat16, tokens per chunk 32, 64, weights 0123456789ab"


def test_ls_without_config_or_pages(root: Path, paths: NamespacePaths) -> None:
    shutil.rmtree(paths.pages)
    os.unlink(paths.config)
    shutil.rmtree(root / ".kvstrata")
    listed = run_json("ls", root)
    (found,) = listed["namespaces"]
    assert listed["books"] is None and (found["used_age_s"], found["share"]) == (None, 0.0)
    ages = (found["oldest_age_s"], found["newest_age_s"])
    assert (found["files"], found["fields"], *ages) == (0, None, None, None)
    assert run("ls", root).splitlines() == [
        f"{root}: no books of a disk budget that can be read",
        f"org_model {found['digest']}",
        "    config.json: missing: No such file or directory",
        "    0 files, 0 B (0%); 0 temporary, 0 quarantined",
    ]


def test_ls_beside_a_server(root: Path) -> None:
    options = {"root_dir": str(root), "max_bytes": "1GiB", "max_files": 100, "min_free_bytes": 4096}
    tier = FsTier(options, CONTEXT)
    store(tier, {KEYS[0]: make_data(0, CONTEXT.layouts[0].nbytes)})
    ledger = root / ".kvstrata/ledger"
    # its I/O processes, of which one may have stored the page before the other was there
    wait_until(lambda: run_json("ls", root)["books"]["servers"] == 2)
    books = run_json("ls", root)["books"]
    shown = run("ls", root).splitlines()[0]
    assert tier.shutdown(60.0)
    limits = [books[name] for name in ("max_bytes", "max_files", "min_free_bytes")]
    assert limits == [2**30, 100, 4096]
    assert len(bytes.fromhex(books["keeper"])) == 16
    assert "of at most 100, " in shown and "of at most 1.0 GiB, " in shown
    assert "of at least 4.0 KiB; 2 members, the keeper is " + books["keeper"][:8] in shown
    written = (ledger.read_bytes(), ledger.stat().st_mtime_ns)
    assert run_json("ls", root)["books"]["servers"] == 0
    assert (ledger.read_bytes(), ledger.stat().st_mtime_ns) == written


def test_a_root_without_namespaces(paths: NamespacePaths) -> None:
    """A namespace's own directories look like roots."""
    for misplaced in (Path(paths.home), Path(paths.pages)):
        remedy = f"no namespaces below '{misplaced}': give the root_dir of the fs tier\n"
        assert outcome("ls", misplaced) == (2, "", f"kvstrata: {remedy}")
        assert outcome("check", misplaced) == (2, "", f"kvstrata: {remedy}")
        code, out, err = outcome("ls", misplaced, "--json")
        assert (code, json.loads(out)["namespaces"], err) == (2, [], f"kvstrata: {remedy}")
        before = sorted(misplaced.rglob("*"))
        code, out, err = outcome("check", misplaced, "--fix", "--json")
        assert (code, json.loads(out)["files"], err) == (2, 0, f"kvstrata: {remedy}")
        assert outcome("gc", misplaced, "--max-files", 1) == (2, "", f"kvstrata: {remedy}")
        assert sorted(misplaced.rglob("*")) == before


@pytest.mark.parametrize("content", [[], ["lost+found"]])
def test_an_empty_root_holds_nothing_bad(tmp_path: Path, content: list[str]) -> None:
    for name in content:
        (tmp_path / name).mkdir()
    said = f"kvstrata: no namespaces below '{tmp_path}'\n"
    assert outcome("ls", tmp_path) == (0, "", said)
    assert outcome("check", tmp_path) == (0, "0 files, 0 B, 0 bad, 0 temporary\n", said)
    assert outcome("gc", tmp_path, "--max-files", 1) == (0, "", said)
    assert [path.name for path in tmp_path.iterdir()] == content


@pytest.mark.parametrize("command", [["ls"], ["check", "--fix"], ["gc", "--max-files", 1]])
def test_a_root_that_is_a_file(command: list[object], page: Path) -> None:
    assert run(*command, page, exit_code=2) == f"kvstrata: '{page}': Not a directory\n"


# ---- the console script ----


def test_the_console_script(root: Path, page: Path) -> None:
    flip(page, -1)
    done = subprocess.run([SCRIPT, "check", root], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")  # no bar: stderr is no terminal
    assert "1 bad (1 page)" in done.stdout


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
    assert all(
        name in shown for name in ("inspect", "ls", "check", "gc", "copy", "doctor", "config")
    )
    assert "root_dir" in run("check", "--help")
    assert "Exits with 1" in run("doctor", "--help")
    assert "nonsense" in run("nonsense", exit_code=2)


def test_looking_at_files_imports_neither_torch_nor_vllm(root: Path, page: Path) -> None:
    """They take seconds."""
    script = f"""
import sys
from typer.testing import CliRunner
from kvstrata.offload.cli.main import app
for command in [["ls"], ["check", "--fix"], ["gc", "--max-files", "100"]]:
    assert CliRunner().invoke(app, [*command, {str(root)!r}]).exit_code == 0
assert CliRunner().invoke(app, ["inspect", {str(page)!r}]).exit_code == 0
print(*sorted({{"torch", "triton", "vllm"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr
