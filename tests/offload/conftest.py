from pathlib import Path

import pytest

from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.files.namespace import namespace_paths
from kvstrata.tiers.testing import CONTEXT
from tests.conftest import FillRoot
from tests.offload.cli.cli_world import KEYS, PAGES


@pytest.fixture(scope="session", autouse=True)
def any_disk(disk_of_any_fullness: None) -> None:
    """See there."""


@pytest.fixture
def paths(root: Path, fill_root: FillRoot) -> NamespacePaths:
    """A root that the filesystem tier filled."""
    fill_root(root, PAGES)
    return namespace_paths(str(root), CONTEXT.model, CONTEXT.namespace)


@pytest.fixture
def page(paths: NamespacePaths) -> Path:
    """The file of KEYS[0]."""
    return Path(paths.page(KEYS[0]))
