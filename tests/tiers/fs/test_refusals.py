"""Directories are judged before they are used, and nothing changes."""

import os
import re
from pathlib import Path

import pytest

from kvstrata.tiers.fs.refusals import refusal_by_look


@pytest.fixture
def someone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which this user may write in `mine` only."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")

    def access(path: str, mode: int, *, effective_ids: bool) -> bool:
        assert effective_ids
        return mode == os.X_OK or Path(path).name == "mine"

    monkeypatch.setattr(os, "access", access)
    return tmp_path


def test_what_can_be_used(someone: Path) -> None:
    for path in (someone / "mine", someone / "mine" / "a" / "b"):
        assert refusal_by_look(str(path)) == ""
    assert sorted(os.listdir(someone)) == ["broken", "file", "mine", "theirs"]
    assert os.listdir(someone / "mine") == []


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("file", "is not a directory; give a directory"),
        ("broken", r"cannot be made: '.*/broken' is a symbolic link to '.*'.*; make that"),
        ("file/kv", "cannot be made: '.*/file' is not a directory; choose"),
        ("theirs", r"is not writable by this user \(\d+\): it has user \d+.*; change its owner"),
        (
            "theirs/a/kv",
            r"does not exist, and this user \(\d+\) may not make it in '.*/theirs'; make it as "
            r"root \(mkdir -p .*/theirs/a/kv && chown",
        ),
    ],
)
def test_what_cannot(someone: Path, path: str, words: str) -> None:
    assert re.match(words, refusal_by_look(str(someone / path)))


def test_a_read_only_directory_can_be_loaded_from(
    someone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list(os.statvfs(someone))
    found[8] |= os.ST_RDONLY
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(found))
    assert refusal_by_look(str(someone / "theirs")) == ""
    new = refusal_by_look(str(someone / "theirs" / "new"))
    assert re.match("does not exist, and '.*/theirs' is on a read-only file system; mount", new)
