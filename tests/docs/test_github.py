"""The files that GitHub and pre-commit read are what these take, and run what the Makefile runs."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.blocks import ROOT

GITHUB = ROOT / ".github"
YAML = sorted(
    path
    for folder in (ROOT, GITHUB, ROOT / "docs")
    for path in (folder.glob("*") if folder == ROOT else folder.rglob("*"))
    if path.suffix in (".yml", ".yaml")
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FORMS = [path for path in (GITHUB / "ISSUE_TEMPLATE").iterdir() if path.stem != "config"]


class _Strict(yaml.SafeLoader):
    """Refuses a key that is given twice, of which PyYAML would take the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key is given twice: {node.start_mark}"
        return super().construct_mapping(node, deep)


def load(path: Path) -> Any:
    (document,) = yaml.load_all(path.read_text(), _Strict)
    return document


def test_files_are_found() -> None:
    names = {path.name for path in YAML}
    assert {".pre-commit-config.yaml", "ci.yml", "bug.yml", "compose.yaml"} <= names


@pytest.mark.parametrize("path", YAML, ids=lambda path: str(path.relative_to(ROOT)))
def test_yaml_is_read(path: Path) -> None:
    documents = list(yaml.load_all(path.read_text(), _Strict))
    assert documents and all(isinstance(document, dict) for document in documents)


def recipe(target: str) -> list[str]:
    """What the Makefile runs for a target, without variables."""
    text = (ROOT / "Makefile").read_text()
    (lines,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", text, re.M)
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in lines.splitlines()]


def test_hooks_run_what_the_makefile_runs() -> None:
    (repo,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repo["repo"] == "local"
    assert [hook["entry"] for hook in repo["hooks"]] == recipe("lint") + recipe("types")
    for hook in repo["hooks"]:
        # over everything, as the commands say which files are theirs
        assert (hook["language"], hook["pass_filenames"]) == ("system", False)
    assert len({hook["id"] for hook in repo["hooks"]}) == len(repo["hooks"])


def test_the_workflow_runs_ci_on_each_python() -> None:
    workflow = load(GITHUB / "workflows" / "ci.yml")
    (job,) = workflow["jobs"].values()
    classifiers = PROJECT["classifiers"]
    pythons = [c.rpartition(" ")[2] for c in classifiers if "Python :: 3." in c]
    assert job["strategy"]["matrix"]["python"] == pythons
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_the_workflow_reads_only_and_has_no_secret() -> None:
    path = GITHUB / "workflows" / "ci.yml"
    assert load(path)["permissions"] == {"contents": "read"}
    assert "secrets" not in path.read_text()
    assert True in load(path), "PyYAML reads the key `on` as true"
    assert "pull_request_target" not in load(path)[True]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_an_issue_form(path: Path) -> None:
    """What GitHub demands of one: https://docs.github.com, "Syntax for issue forms"."""
    form = load(path)
    assert form["name"] and form["description"]
    ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert ids and len(ids) == len(set(ids))
    for part in form["body"]:
        assert part["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        assert part["attributes"]["value" if part["type"] == "markdown" else "label"]
    assert any(part.get("validations", {}).get("required") for part in form["body"])
