from pathlib import Path

import pytest

from kvstrata.tiers.fs.layout import NamespacePaths
from tests.offload.cli_world import KEYS, fill


@pytest.fixture
def paths(root: Path) -> NamespacePaths:
    """A root that the filesystem tier filled."""
    return fill(root)


@pytest.fixture
def page(paths: NamespacePaths) -> Path:
    """The file of KEYS[0]."""
    return Path(paths.page(KEYS[0]))
