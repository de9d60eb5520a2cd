import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tiers.fs.budget.harness import Server, drive, make_quick


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers here look at the books without much waiting, and note every use."""
    make_quick(monkeypatch)


OpenServer = Callable[..., Server]


@pytest.fixture
def open_server(root: Path, quick: None) -> Iterator[OpenServer]:
    """Makes servers on `root`; closes them at the end."""
    made: list[Server] = []

    def make(*args: Any, at: Path = root, **options: Any) -> Server:
        made.append(Server(at, *args, **options))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def open_driven(root: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenServer]:
    """Makes servers on `root` that do nothing until `turn` is called."""
    drive(monkeypatch)
    yield lambda *args, **options: Server(root, *args, **options)


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
