import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes file systems of a size such as "4m"; only root can."""
    made: list[Path] = []

    def make(size: str) -> Path:
        path = tmp_path / f"disk{len(made)}"
        path.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
        if subprocess.run(mount, capture_output=True).returncode != 0:
            pytest.skip("a file system cannot be mounted here")
        made.append(path)
        return path

    yield make
    for path in made:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
