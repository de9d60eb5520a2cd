"""When the name of a blob in Hugging Face's cache is believed."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstrata.offload.vllm_plugin.weights.hub import hub_digest

CONTENT = b"weights of a model"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def link(tmp_path: Path) -> Path:
    """A file of a snapshot, as a download leaves it."""
    return downloaded(tmp_path / "models--org--name", SHA256)


def downloaded(repository: Path, etag: str) -> Path:
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / f"{etag}.incomplete").write_bytes(CONTENT)
    (blobs / f"{etag}.incomplete").rename(blobs / etag)
    link = snapshot / "model.safetensors"
    link.symlink_to(f"../../blobs/{etag}")
    return link


def test_a_blob_is_named_by_its_content(link: Path, tmp_path: Path) -> None:
    assert hub_digest(str(link)) == SHA256
    (tmp_path / "there").symlink_to(link.parent)
    assert hub_digest(str(tmp_path / "there" / link.name)) == SHA256


def later(path: Path) -> None:
    """Wait until a change of the file has another time."""
    probe = path.parent / "probe"
    before = path.lstat().st_ctime_ns
    while True:
        probe.write_bytes(b"")
        if probe.stat().st_ctime_ns > before:
            break
        probe.unlink()
    probe.unlink()


def edit(link: Path) -> None:
    later(link)
    with open(link, "r+b") as file:
        file.write(b"W")


def edit_and_set_the_time_back(link: Path) -> None:
    before = link.stat()
    edit(link)
    os.utime(link, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert link.stat().st_mtime_ns == before.st_mtime_ns


def replace(link: Path) -> None:
    later(link)
    new = link.parent / "new"
    new.write_bytes(b"W" + CONTENT[1:])
    os.replace(new, link.resolve())


def touch(link: Path) -> None:
    later(link)
    os.utime(link)


@pytest.mark.parametrize("change", [edit, edit_and_set_the_time_back, replace, touch])
def test_a_blob_that_was_touched_since_is_not_believed(
    change: Callable[[Path], None], link: Path
) -> None:
    change(link)
    assert hub_digest(str(link)) is None


def test_an_edited_blob_in_a_copied_cache(link: Path, tmp_path: Path) -> None:
    """Copies are made in any order and keep modification times."""
    edit(link)
    for part in ("blobs", "snapshots"):
        target = tmp_path / "copy" / "models--org--name"
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-a", tmp_path / "models--org--name" / part, target], check=True)
    assert hub_digest(str(target / "snapshots/abc/model.safetensors")) is None


def test_names_that_are_no_sha256(tmp_path: Path) -> None:
    for index, etag in enumerate(("a" * 40, "A" * 64, "g" * 64, SHA256[:-1], SHA256 + "0")):
        link = downloaded(tmp_path / f"models--o--{index}", etag)
        assert hub_digest(str(link)) is None


def test_other_places(link: Path, tmp_path: Path) -> None:
    """A file of that name may be anything elsewhere, and a copy is no link."""
    plain = tmp_path / SHA256
    plain.write_bytes(CONTENT)
    (tmp_path / "link").symlink_to(plain)
    assert hub_digest(str(tmp_path / "link")) is None
    assert hub_digest(str(plain)) is None
    assert hub_digest(str(link.resolve())) is None
    assert hub_digest(str(downloaded(tmp_path / "datasets--x", SHA256))) is None
    shutil.copy(link, tmp_path / "copy")
    assert hub_digest(str(tmp_path / "copy")) is None


def test_a_link_to_nothing(link: Path) -> None:
    link.resolve().unlink()
    with pytest.raises(FileNotFoundError):
        hub_digest(str(link))


def test_an_archive_with_whole_seconds_tells_nothing_within_one(link: Path) -> None:
    """An edit right after the download, and then `tar`, which may keep seconds only."""
    blob = link.resolve()
    for path in (blob, link):
        os.utime(path, ns=(10**18, 10**18), follow_symlinks=False)
    later(link)
    os.utime(link, ns=(10**18, 10**18), follow_symlinks=False)  # the link's change is later
    assert hub_digest(str(link)) is None
    os.utime(link, ns=(10**18 + 10**9, 10**18 + 10**9), follow_symlinks=False)
    assert hub_digest(str(link)) == SHA256
