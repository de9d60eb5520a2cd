"""`kvstrata gc`: what it keeps, and which options it refuses."""

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstrata.offload.cli.main import app
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.testing import CONTEXT, load, make_data, make_key, store
from tests.offload.cli.cli_world import KEYS, run, run_json

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
    assert shown.endswith("; 0 files, 0 B deleted by this command\n")


def test_gc_beside_a_server(root: Path, paths: NamespacePaths) -> None:
    tier = fill_many(root)
    shown = run("gc", root, "--max-files", 20)
    done = run_json("gc", root, "--max-bytes", "64KiB")
    assert "; 0 files" not in shown and "deleted by this command and by the member" in shown
    assert tier.shutdown(60.0)
    assert done["within"] and done["servers"] == 2
    assert done["evicted_files"] == done["before"]["files"] - done["after"]["files"] > 0
    assert done["evicted_bytes"] == done["before"]["bytes"] - done["after"]["bytes"] > 0
    assert done["after"]["bytes"] <= 65536 < done["before"]["bytes"]
    assert done["after"]["files"] < done["before"]["files"] and len(left(paths)) < 20


def test_what_a_server_may_write_without_asking_again_is_no_file(
    root: Path, paths: NamespacePaths
) -> None:
    tier = fill_many(root)
    stored = len(left(paths))
    done = run_json("gc", root, "--max-files", 2 * stored)
    assert tier.shutdown(60.0)
    assert done["before"]["files"] < 2 * stored and len(left(paths)) == stored


def test_limits_that_cannot_be_reached(root: Path, paths: NamespacePaths) -> None:
    """Then nothing is deleted."""
    disk = os.statvfs(root)
    for limit in (
        ("--max-bytes", "16KiB"),  # which the books alone take
        ("--max-files", 2),
        ("--min-free-bytes", disk.f_blocks * disk.f_frsize),
    ):
        shown = run("gc", root, *limit, exit_code=1).splitlines()[-1]
        assert shown.startswith("the limits cannot be reached, and nothing was deleted: without")
        done = run_json("gc", root, *limit, exit_code=1)
        assert done["refused"] and not done["within"] and done["evicted_files"] == 0
        assert f" {done['fixed']['files']} files, " in shown
        assert done["before"] == done["after"]
        assert all(os.path.exists(paths.page(key)) for key in KEYS)
    assert 2 < done["fixed"]["files"] < done["before"]["files"]
    assert 16 * 1024 < done["fixed"]["bytes"] < done["before"]["bytes"]


def test_the_least_that_can_be_reached(root: Path, paths: NamespacePaths) -> None:
    (root / "foreign").write_bytes(bytes(10**5))
    refused = run_json("gc", root, "--max-bytes", "16KiB", exit_code=1)
    done = run_json("gc", root, "--max-bytes", refused["fixed"]["bytes"])
    assert done["within"] and not any(os.path.exists(paths.page(key)) for key in KEYS)
    assert (root / "foreign").exists()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ([], "at least one limit"),
        (["--min-free-bytes", "0"], "at least one limit"),
        (["--max-bytes", "10x"], "max_bytes: '10x' is not a size"),
        (["--max-bytes", "0"], "max_bytes: '0' is not positive"),
        (["--max-files", "0"], "max_files: 0 is wrong"),
        (["--max-files", str(2**64)], "is wrong"),
        (["--max-files", "many"], "unable to parse string as an integer"),
        (["--min-free-bytes", "0%"], "give at least one limit"),
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
            path.chmod(path.stat().st_mode | 0o055)  # /tmp keeps its own
    with another_user():
        said = run("gc", root, "--max-files", "5", exit_code=2)
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
    assert "setpriv --reuid=65534 --regid=65534 --clear-groups" in said
    assert sorted(root.rglob("*")) == before


def test_json_is_the_only_thing_on_stdout(root: Path, paths: NamespacePaths) -> None:
    result = CliRunner().invoke(app, ["gc", str(root), "--max-files", "100", "--json"])
    assert set(json.loads(result.stdout)) == {
        *("within", "limits", "refused", "fixed", "servers", "evicted_files", "evicted_bytes"),
        *("before", "after", "failures"),
    }
