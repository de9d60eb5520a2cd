"""SHA-256 of whole files, read once, in parallel, by several processes."""

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from kvstrata.offload.vllm_plugin.weights import content
from kvstrata.offload.vllm_plugin.weights.content import (
    READ_BYTES,
    Found,
    attempt,
    find_digests,
    read_digest,
    read_digests,
    share,
    threads_for,
)
from kvstrata.offload.vllm_plugin.weights.identity import Identity, identity_of
from kvstrata.offload.vllm_plugin.weights.memory import DigestMemory


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DigestMemory:
    """Remembers files that were made just now."""
    monkeypatch.setattr("kvstrata.offload.vllm_plugin.weights.memory.SETTLED_NS", 0)
    return DigestMemory(str(tmp_path / "cache"))


def files(tmp_path: Path, *sizes: int) -> list[str]:
    paths = []
    for number, size in enumerate(sizes):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(os.urandom(size))
        paths.append(str(path))
    return paths


@pytest.mark.parametrize("size", [0, 1, READ_BYTES - 1, READ_BYTES, READ_BYTES + 1])
def test_a_digest_is_sha256_of_every_byte(size: int, tmp_path: Path) -> None:
    [path] = files(tmp_path, size)
    expected = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert read_digest(path, identity_of(path)) == expected


def test_the_second_start_opens_no_file(
    tmp_path: Path, memory: DigestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = files(tmp_path, 10, 2000, 0)
    first = find_digests(paths, memory)
    assert [found.digest for found in first.values()] == [None] * 3
    [unread] = share(first, 1)
    digests = read_digests(unread, first, memory, 2)

    def refuse(path: Any, *args: Any, **kwargs: Any) -> int:
        assert str(path) not in paths, "a weight file was opened"
        return opened(path, *args, **kwargs)

    opened = os.open
    monkeypatch.setattr(os, "open", refuse)
    second = find_digests(paths, memory)
    assert share(second, 1) == [[]]
    assert {found.identity: found.digest for found in second.values()} == digests


@pytest.mark.parametrize("change", ["content", "content, same mtime", "rename over it"])
def test_a_change_is_seen(change: str, tmp_path: Path, memory: DigestMemory) -> None:
    [path] = files(tmp_path, 1000)
    found = find_digests([path], memory)
    read_digests([path], found, memory, 1)
    before = os.stat(path)
    while True:  # until the file system's clock has moved on
        if change == "rename over it":
            new = tmp_path / "new"
            new.write_bytes(bytes(1000))
            os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
            os.replace(new, path)
        else:
            Path(path).write_bytes(bytes(1000))
            if change == "content, same mtime":
                os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        if os.stat(path).st_ctime_ns != before.st_ctime_ns:
            break
    assert find_digests([path], memory)[path].digest is None


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "missing", "dangling"])
def test_what_is_no_file_is_an_error_and_never_a_wait(
    kind: str, tmp_path: Path, memory: DigestMemory
) -> None:
    path = tmp_path / "a.safetensors"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nothing")
    with pytest.raises(OSError, match=r"a\.safetensors"):
        find_digests([str(path)], memory)


def test_a_file_that_changes_meanwhile_is_an_error(
    tmp_path: Path, memory: DigestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    [path] = files(tmp_path, 10)
    found = find_digests([path], memory)
    os.truncate(path, 9)
    with pytest.raises(OSError, match="changes while it is read"):
        read_digests([path], found, memory, 1)

    class Grower:
        """A hash during which somebody appends."""

        def update(self, data: memoryview) -> None:
            with open(path, "ab") as file:
                file.write(b"x" if file.tell() == 9 else b"")

    found = find_digests([path], memory)
    monkeypatch.setattr(content.hashlib, "sha256", Grower)
    with pytest.raises(OSError, match="changes while it is read"):
        read_digests([path], found, memory, 1)
    monkeypatch.undo()
    assert find_digests([path], memory)[path].digest is None


def found_of(sizes: dict[str, int], known: str = "") -> dict[str, Found]:
    return {
        name: Found(Identity(1, ord(name[0]), size, 0, 0), "ab" * 32 if name in known else None)
        for name, size in sizes.items()
    }


def test_ranks_read_as_much_each_and_nothing_twice() -> None:
    found = found_of({"a": 5, "b": 9, "c": 4, "d": 1, "e": 7, "f": 0}, known="e")
    assert share(found, 1) == [["b", "a", "c", "d", "f"]]
    assert share(found, 2) == [["b", "d"], ["a", "c", "f"]]
    parts = share(found, 3)
    assert sorted(path for part in parts for path in part) == ["a", "b", "c", "d", "f"]
    loads = [sum(found[path].identity.size for path in part) for part in parts]
    assert sorted(loads) == [5, 5, 9]
    assert share(found, 9)[5:] == [[]] * 4


def test_links_to_one_file_are_read_once(tmp_path: Path, memory: DigestMemory) -> None:
    [path] = files(tmp_path, 10)
    os.link(path, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(path)
    found = find_digests([path, str(tmp_path / "hard"), str(tmp_path / "soft")], memory)
    assert [len(part) for part in share(found, 2)] == [1, 0]


def test_a_large_young_file_is_read_once_it_can_be_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the second start would read it again."""
    monkeypatch.setattr(content, "LARGE_BYTES", 1000)
    waits: list[float] = []
    monkeypatch.setattr(content.time, "sleep", waits.append)
    memory = DigestMemory(str(tmp_path / "cache"))
    paths = files(tmp_path, 999, 1000)
    os.utime(paths[1], (1, 1))
    found = find_digests(paths, memory)
    read_digests(paths, found, memory, 1)
    assert len(waits) == 1 and 0.0 < waits[0] <= 2.0


def test_an_attempt_has_a_value_or_words() -> None:
    def fail(text: str) -> None:
        raise OSError(text)

    assert attempt(lambda: 3) == (3, None)
    assert attempt(lambda: fail("broken")) == (None, "broken")
    assert attempt(lambda: fail("")) == (None, "OSError")


def test_ranks_share_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads_for(1) == min(16, cores)
    assert threads_for(10_000) == 1
