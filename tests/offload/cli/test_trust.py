"""`kvstrata trust`: the operator's word on what audits found."""

from pathlib import Path

from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.files.trust import distrust, is_trusted
from tests.offload.cli.cli_world import run, run_json


def test_trust(root: Path, paths: NamespacePaths) -> None:
    distrust(paths, 0o600)
    assert "NOT IN USE" in run("ls", root)
    assert run_json("ls", root)["namespaces"][0]["trusted"] is False
    said = run("trust", root, paths.name[-12:])
    assert said.startswith(f"{paths.name} is trusted again") and "audits found pages" in said
    assert is_trusted(paths)
    assert run("trust", root, paths.name) == f"{paths.name} was trusted already\n"
    assert "NOT IN USE" not in run("ls", root)
    assert run_json("ls", root)["namespaces"][0]["trusted"] is True


def test_a_marker_is_no_damage(root: Path, paths: NamespacePaths) -> None:
    distrust(paths, 0o600)
    assert "0 bad" in run("check", root)


def test_names_that_fit_nothing(root: Path, paths: NamespacePaths, tmp_path: Path) -> None:
    assert paths.name in run("trust", root, "other", exit_code=2)
    assert "no namespaces" in run("trust", tmp_path, "other", exit_code=2)
    assert "none" in run("trust", tmp_path / "none", "other", exit_code=2)
