import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kvstrata.tiers.process.process as process_module
from kvstrata.tiers.base import TierContext
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.files.namespace import namespace_paths
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.testing import CONTEXT


@pytest.fixture(scope="session", autouse=True)
def any_disk(disk_of_any_fullness: None) -> None:
    """See there."""


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
        context = replace(context, region=CONTEXT.region)
        made.append(FsTier({**defaults, **options}, context))
        return made[-1]

    yield make
    for tier in made:
        assert tier.shutdown(60.0)


class Faults:
    """What happens at the calls of the I/O processes, see `faulty_worker.CALLS`.

    An errno, or "hang" (until something else is set), "surprise" (no OSError), "crash". The
    entry "euid" is no call: the process becomes that user.
    """

    def __init__(self, control: Path) -> None:
        self.control = control
        self.set()

    def set(self, **faults: int | str) -> None:
        """From now on these, and no others."""
        new = self.control.with_suffix(".new")
        new.write_text(json.dumps(faults))
        new.rename(self.control)


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """Faults of the tiers that are made from now on."""
    faults = Faults(tmp_path / "faults.json")
    script = str(Path(__file__).with_name("faulty_worker.py"))
    command = (sys.executable, "-P", script, str(faults.control))
    monkeypatch.setattr(process_module, "COMMAND", command)
    yield faults
    faults.set()


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


@pytest.fixture
def another_user(faults: Faults) -> Callable[[], AbstractContextManager[None]]:
    """Makes a context without root's right to open everything; changes nothing for others."""

    @contextmanager
    def change() -> Iterator[None]:
        if os.geteuid() != 0:
            yield
            return
        faults.set(euid=65534)
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)
            faults.set(euid=0)

    return change
