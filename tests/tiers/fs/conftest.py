import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstrata.tiers.base import TierContext
from kvstrata.tiers.fs.layout import NamespacePaths
from kvstrata.tiers.fs.namespace import namespace_paths
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.testing import CONTEXT


@pytest.fixture
def paths(root: Path) -> NamespacePaths:
    """The paths of the contract's namespace."""
    return namespace_paths(str(root), CONTEXT.model, CONTEXT.namespace)


@pytest.fixture
def open_tier(root: Path) -> Iterator[Callable[..., FsTier]]:
    """Makes tiers on `root` with few threads; shuts them down at the end."""
    made: list[FsTier] = []

    def make(context: TierContext = CONTEXT, **options: Any) -> FsTier:
        defaults = {"root_dir": str(root), "n_read_threads": 2, "n_write_threads": 2}
        made.append(FsTier({**defaults, **options}, context))
        return made[-1]

    yield make
    for tier in made:
        assert tier.shutdown(60.0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB; only root can make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a file system cannot be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)
