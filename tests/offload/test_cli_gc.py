"""`kvstrata gc`: what it keeps, and which options it refuses."""

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstrata.offload.cli import app
from kvstrata.tiers.fs.layout import NamespacePaths
from kvstrata.tiers.fs.space import offline
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.testing import CONTEXT, load, make_data, make_key, store
from tests.offload.cli_world import KEYS, run, run_json

MANY = [make_key(n) for n in range(20)]


def fill_many(root: Path, **options: object) -> FsTier:
    tier = FsTier({"root_dir": str(root), **options}, CONTEXT)
    for number, key in enumerate(MANY):
        assert not store(tier, {key: make_data(number, CONTEXT.layouts[0].nbytes)}).failed
    return tier


def left(paths: NamespacePaths) -> list[int]:
    return [number for number, key in enumerate(MANY) if os.path.exists(paths.page(key))]


def test_gc_keeps_what_was_used_last(root: Path, paths: NamespacePaths) -> None:
    tier = fill_many(root)
    assert not load(tier, [MANY[0]])[0].failed
    assert tier.shutdown(60.0)
    before = len(left(paths))
    done = run_json("gc", root, "--max-files", before)
    assert done["within"] and done["servers"] == 0 and done["failures"] == {}
    assert done["limits"] == {"max_bytes": None, "max_files": before, "min_free_bytes": None}
    kept = left(paths)
    assert done["evicted_files"] > 0
    assert 0 in kept and 19 in kept and 1 not in kept
    assert done["after"]["files"] <= before < done["before"]["files"]
    assert done["evicted_bytes"] > 0 and done["after"]["bytes"] < done["before"]["bytes"]
    shown = run("gc", root, "--max-files", before)
    assert shown.endswith("; 0 pages, 0 B deleted by this command\n")


def test_gc_beside_a_server(root: Path, paths: NamespacePaths) -> None:
    tier = fill_many(root)
    done = run_json("gc", root, "--max-bytes", "64KiB")
    assert tier.shutdown(60.0)
    assert done["within"] and done["servers"] == 2 and done["evicted_files"] == 0
    assert done["after"]["bytes"] <= 65536 < done["before"]["bytes"]
    assert done["after"]["files"] < done["before"]["files"] and len(left(paths)) < 20


def test_limits_that_cannot_be_reached(
    root: Path, paths: NamespacePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline, "_STUCK_S", 0.2)
    (root / "foreign").write_bytes(bytes(10**5))
    shown = run("gc", root, "--max-bytes", "50KB", exit_code=1)
    assert shown.splitlines()[-1] == "the limits were not reached: nothing else can be deleted"
    assert (root / "foreign").exists() and not any(os.path.exists(paths.page(k)) for k in KEYS)
    assert run_json("gc", root, "--max-bytes", "50KB", exit_code=1)["within"] is False


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ([], "at least one limit"),
        (["--max-bytes", "10x"], "max_bytes: '10x' is not a size"),
        (["--max-bytes", "0"], "max_bytes: '0' is not positive"),
        (["--max-files", "0"], "max_files: 0 is wrong"),
        (["--max-files", str(2**64)], "is wrong"),
        (["--max-files", "many"], "unable to parse string as an integer"),
        (["--min-free-bytes", "0%"], "min_free_bytes: '0%' is no share of a disk"),
        (["--min-free-bytes", "100%"], "is no share of a disk"),
        (["--min-free-bytes", "1000000TiB"], "smaller than that"),
    ],
)
def test_wrong_options(root: Path, paths: NamespacePaths, options: list[str], word: str) -> None:
    before = sorted(root.rglob("*"))
    result = CliRunner().invoke(app, ["gc", str(root), *options])
    assert result.exit_code == 2
    # typer draws a box around it
    assert word in " ".join(result.stderr.replace("│", " ").split())
    assert sorted(root.rglob("*")) == before and all(os.path.exists(paths.page(k)) for k in KEYS)


def test_a_share_of_the_file_system(root: Path, paths: NamespacePaths) -> None:
    disk = os.statvfs(root)
    least = run_json("gc", root, "--min-free-bytes", "0.001%")["limits"]["min_free_bytes"]
    assert least == disk.f_blocks * disk.f_frsize // 100_000
    assert all(os.path.exists(paths.page(key)) for key in KEYS)


def test_gc_without_the_right_to_write(
    root: Path, paths: NamespacePaths, another_user: Callable[[], AbstractContextManager[None]]
) -> None:
    for path in (root, *root.parents, *root.rglob("*")):
        if path.stat().st_uid == os.geteuid() and path != Path("/"):
            path.chmod(0o755)
    with another_user():
        said = run("gc", root, "--max-files", "1", exit_code=2)
    assert said.startswith(f"kvstrata: '{root}': ")
    assert all(os.path.exists(paths.page(key)) for key in KEYS)


@pytest.mark.parametrize("command", [["gc", "--max-files", 1], ["check", "--fix"]])
def test_root_makes_no_files_for_others(
    root: Path, paths: NamespacePaths, command: list[object]
) -> None:
    """Their servers could not use the books any more."""
    if os.geteuid() != 0:
        pytest.skip("only root could")
    os.chown(root / ".kvstrata", 65534, 65534)
    before = sorted(root.rglob("*"))
    said = run(*command, root, exit_code=2)
    assert said.startswith(f"kvstrata: '{root}' belongs to user 65534; run this as the servers do")
    assert sorted(root.rglob("*")) == before


def test_json_is_the_only_thing_on_stdout(root: Path, paths: NamespacePaths) -> None:
    result = CliRunner().invoke(app, ["gc", str(root), "--max-files", "100", "--json"])
    assert set(json.loads(result.stdout)) == {
        *("within", "limits", "servers", "evicted_files", "evicted_bytes"),
        *("before", "after", "failures"),
    }
