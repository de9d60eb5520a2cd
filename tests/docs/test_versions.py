"""docs/versions.md and the changelog name the versions that the code has."""

import re
import tomllib

import pytest

from kvstrata.offload.primary import region
from kvstrata.offload.vllm_plugin.namespace import namespace
from kvstrata.tiers.fs.budget import journal, ledger, snapshot
from kvstrata.tiers.page import form
from tests.docs.blocks import ROOT

TEXT = (ROOT / "docs" / "versions.md").read_text()
FORMATS = {
    "page file": form.FORMAT_VERSION,
    "namespace": str(namespace.FORMAT_VERSION),
    "journal": journal._MAGIC.decode(),
    "ledger": ledger._MAGIC.decode(),
    "snapshot": snapshot._MAGIC.decode(),
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_version_of_a_format(name: str) -> None:
    (row,) = re.findall(rf"^\| {name} \| `?(\w+)`? \|", TEXT, re.M)
    assert row == FORMATS[name]


def test_the_version_of_the_region() -> None:
    assert f"`{region._MAGIC.decode()}`" in TEXT


def test_the_changelog_begins_with_the_packages_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = re.findall(r"^## (\S+?),? ", (ROOT / "docs" / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] == project["version"]


def test_public_modules_are_there() -> None:
    """The row of Python names in docs/versions.md."""
    (row,) = re.findall(r"^\| Python: (.*?) \|", TEXT, re.M)
    names = re.findall(r"`(kvstrata\.[\w.]+)`", row)
    assert len(names) >= 4
    for name in names:
        path = ROOT.joinpath(*name.split(".")[1:])
        assert path.is_dir() or path.with_suffix(".py").is_file(), name
