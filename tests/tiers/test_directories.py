"""Directories are judged before they are used, and nothing changes."""

import os
import re
from pathlib import Path

import pytest

from kvstrata.tiers import directories
from kvstrata.tiers.base import TierConfigError
from kvstrata.tiers.directories import check_directory


@pytest.fixture
def someone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which this user may write in `mine` only."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")

    def access(path: str, mode: int, *, effective_ids: bool) -> bool:
        assert effective_ids and mode == os.W_OK | os.X_OK
        return Path(path).name == "mine"

    monkeypatch.setattr(os, "access", access)
    return tmp_path


def test_what_can_be_used(someone: Path) -> None:
    for path in (someone / "mine", someone / "mine" / "a" / "b"):
        check_directory(str(path))
    assert sorted(os.listdir(someone)) == ["broken", "file", "mine", "theirs"]
    assert os.listdir(someone / "mine") == []


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("file", "/file' is not a directory"),
        ("broken", "/broken' is not a directory"),
        ("file/kv", "/file/kv' cannot be made: '.*/file' is not a directory"),
        ("theirs", r"/theirs' is not writable by this user \(uid \d+\): it belongs to uid \d+"),
        (
            "theirs/a/kv",
            r"kv' does not exist and cannot be made: '.*/theirs' is not writable by this user "
            r"\(uid \d+\); make it first: sudo install -d -o \d+ -g \d+ .*/theirs/a/kv$",
        ),
    ],
)
def test_what_cannot(someone: Path, path: str, words: str) -> None:
    with pytest.raises(TierConfigError, match=words):
        check_directory(str(someone / path))


def test_a_read_only_directory_can_be_loaded_from(
    someone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list(os.statvfs(someone))
    found[8] |= os.ST_RDONLY
    monkeypatch.setattr(directories.os, "statvfs", lambda path: os.statvfs_result(found))
    check_directory(str(someone / "theirs"))
    with pytest.raises(TierConfigError, match=re.escape(str(someone / "theirs" / "new"))):
        check_directory(str(someone / "theirs" / "new"))
