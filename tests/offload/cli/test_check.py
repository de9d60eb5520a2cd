"""`kvstrata check`: what it finds, what it repairs, and what it says."""

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.files.temporary import host_name, temporary_name
from kvstrata.tiers.fs.tools import scan
from tests.offload.cli.cli_world import KEYS, run, run_json
from tests.spoiling import flip


def test_check_a_sound_root(root: Path, paths: NamespacePaths) -> None:
    nbytes = sum(os.path.getsize(paths.page(key)) for key in KEYS)
    expected = {
        **{"files": 3, "bytes": nbytes, "temporary": 0, "quarantined": 0, "servers": 0},
        **{"found": {}, "repaired": {}, "left": 0, "remains": 0, "findings": []},
    }
    assert run_json("check", root) == run_json("check", "--fix", root) == expected
    assert run("check", root) == f"3 files, {nbytes / 1024:.1f} KiB, 0 bad, 0 temporary\n"


def test_check_names_each_bad_file(root: Path, paths: NamespacePaths, page: Path) -> None:
    flip(page, -1)
    os.truncate(paths.page(KEYS[2]), 5000)
    *lines, total = run("check", root, exit_code=1).splitlines()
    assert lines == [
        f"bad: {page}: checksum: the data is not what was written",
        f"bad: {paths.page(KEYS[2])}: truncated: 5000 bytes instead of 12368",
    ]
    assert total.endswith(" 2 bad (2 page), 0 temporary")


def test_what_an_ended_server_left_is_no_damage(root: Path, paths: NamespacePaths) -> None:
    lease = root / ".kvstrata" / f"{1:032x}.server"
    lease.touch()
    os.utime(lease, (time.time() - 3600,) * 2)
    dead = Path(paths.home) / temporary_name().replace(host_name(), "0" * 12)
    dead.touch()
    os.utime(dead, (0, 0))
    lines = run("check", root).splitlines()
    assert sorted(line.split(": ")[1] for line in lines[:-1]) == sorted([str(lease), str(dead)])
    assert all(line.startswith("left by an ended server: ") for line in lines[:-1])
    end = " 0 bad, 2 left by ended servers (the next start, or --fix, cleans it), 0 temporary"
    assert lines[-1].endswith(end)
    found = run_json("check", root)
    assert (found["left"], found["remains"]) == (0, 2)
    assert run_json("ls", root)["books"]["damage"] == []
    fixed = run("check", "--fix", root)
    assert fixed.count("removed: ") == 2 and " 2 left by ended servers, 2 removed, 0 left" in fixed
    assert not lease.exists() and not dead.exists()
    assert run_json("check", root)["findings"] == []


def test_a_page_that_an_engine_removes_meanwhile_is_not_bad(
    root: Path, page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evicted(path: str) -> scan.FileReport:
        page.unlink(missing_ok=True)
        return inspect_file(path)

    inspect_file = scan.inspect_file
    monkeypatch.setattr(scan, "inspect_file", evicted)
    assert (run_json("check", root)["files"], page.exists()) == (2, False)


def test_what_cannot_be_read_is_not_called_sound(
    root: Path, page: Path, another_user: Callable[[], AbstractContextManager[None]]
) -> None:
    for directory in (root, *root.parents):
        if directory.stat().st_uid == os.geteuid() and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o055)  # /tmp keeps its own
    for path in root.rglob("*"):
        path.chmod(0o755)
    page.chmod(0)
    closed = page.parents[1]
    with another_user():
        assert run_json("inspect", page, exit_code=1)["reason"] == "unreadable: Permission denied"
    closed.chmod(0)
    with another_user():
        assert run_json("check", root, exit_code=1)["findings"] == [
            {
                **{"path": str(closed), "kind": "directory", "repair": None, "remains": False},
                "reason": "unreadable: Permission denied",
            }
        ]
    closed.chmod(0o755)
    root.chmod(0)
    with another_user():
        sentence = f"kvstrata: '{root}': Permission denied\n"
        assert run("check", root, exit_code=2) == run("ls", root, exit_code=2) == sentence
    root.chmod(0o755)
