"""Digests that are remembered: never believed where they could be wrong."""

import errno
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvstrata.offload.vllm_plugin.weights import memory as memory_module
from kvstrata.offload.vllm_plugin.weights.identity import Identity
from kvstrata.offload.vllm_plugin.weights.memory import SETTLED_NS, DigestMemory, default_memory

NOW = 1_700_000_000_123_456_789
FILE = Identity(7, 42, 1000, NOW - 9 * 10**9, NOW - 9 * 10**9)
DIGEST = "ab" * 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "kvstrata" / "weights"


@pytest.fixture
def memory(folder: Path) -> DigestMemory:
    made = DigestMemory(str(folder))
    made.put(FILE, DIGEST, began_ns=NOW)
    return made


def test_remembered(memory: DigestMemory, folder: Path) -> None:
    assert DigestMemory(str(folder)).get(FILE) == DIGEST
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()] == [0o600]


@pytest.mark.parametrize("field", Identity._fields)
def test_every_part_of_the_identity_counts(field: str, memory: DigestMemory) -> None:
    assert memory.get(FILE._replace(**{field: getattr(FILE, field) + 1})) is None


def test_a_changed_file_takes_the_place_of_the_old_one(memory: DigestMemory, folder: Path) -> None:
    new = FILE._replace(ctime_ns=FILE.ctime_ns + 1)
    memory.put(new, "cd" * 32, began_ns=NOW)
    assert memory.get(new) == "cd" * 32 and memory.get(FILE) is None
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    ("ctime_ns", "remembered"),
    [
        (NOW - SETTLED_NS, True),
        (NOW - SETTLED_NS + 1, False),  # may change again without another time
        (NOW + 10**9, False),  # another clock
        (NOW - 10**12 - NOW % 10**9, False),  # whole seconds: an image, or an object store
    ],
)
def test_what_could_change_unseen_is_not_remembered(
    ctime_ns: int, remembered: bool, folder: Path
) -> None:
    memory = DigestMemory(str(folder))
    file = FILE._replace(ctime_ns=ctime_ns)
    memory.put(file, DIGEST, began_ns=NOW)
    assert (memory.get(file) == DIGEST) is remembered


def entry(folder: Path) -> Path:
    [path] = folder.iterdir()
    return path


def write(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (entry(folder).write_bytes(content), None)[1]


def fifo(folder: Path) -> None:
    path = entry(folder)
    path.unlink()
    os.mkfifo(path, 0o600)


def link(folder: Path) -> None:
    path = entry(folder)
    path.rename(folder.parent / "other")
    path.symlink_to(folder.parent / "other")


def directory(folder: Path) -> None:
    path = entry(folder)
    path.unlink()
    path.mkdir()


def linked_folder(folder: Path) -> None:
    folder.rename(folder.parent / "other")
    folder.symlink_to(folder.parent / "other")


LINE = f"{FILE.size} {FILE.mtime_ns} {FILE.ctime_ns} {DIGEST}\n".encode()
HOSTILE: dict[str, Callable[[Path], None]] = {
    "empty": write(b""),
    "cut": write(LINE[:-1]),
    "more": write(LINE + b"x"),
    "no digest": write(LINE.replace(b"ab", b"xy")),
    "large": write(LINE * 100_000),
    "binary": write(bytes(range(256))),
    "huge numbers": write(b"9" * 2000 + b" 1 1 " + DIGEST.encode() + b"\n"),
    "FIFO": fifo,
    "link": link,
    "directory": directory,
    "link instead of the folder": linked_folder,
    "writable by others": lambda folder: folder.chmod(0o777),
    "file writable by others": lambda folder: entry(folder).chmod(0o666),
    "no folder": lambda folder: (entry(folder).unlink(), folder.rmdir())[1],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_wrong_is_not_believed(kind: str, memory: DigestMemory, folder: Path) -> None:
    HOSTILE[kind](folder)
    assert memory.get(FILE) is None
    memory.put(FILE, "cd" * 32, began_ns=NOW)
    assert memory.get(FILE) in (None, "cd" * 32)


def test_the_line_of_the_tests_is_the_one_that_is_written(
    folder: Path, memory: DigestMemory
) -> None:
    assert entry(folder).read_bytes() == LINE


def test_files_of_other_users_are_not_believed(
    memory: DigestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert memory.get(FILE) is None


@pytest.mark.parametrize("kind", ["a file", "unwritable", "none"])
def test_a_directory_that_cannot_be_had(kind: str, tmp_path: Path) -> None:
    if kind == "a file":
        (tmp_path / "cache").write_text("")
    elif kind == "unwritable":
        (tmp_path / "cache").symlink_to("/proc/self")  # holds for root too
    made = DigestMemory(str(tmp_path / "cache" / "weights") if kind != "none" else None)
    made.put(FILE, DIGEST, began_ns=NOW)
    assert made.get(FILE) is None


def test_a_memory_that_cannot_be_written_is_believed(
    memory: DigestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "read-only")

    for name in ("utime", "rename", "unlink"):
        monkeypatch.setattr(os, name, read_only)
    assert memory.get(FILE) == DIGEST
    memory.put(FILE, "cd" * 32, began_ns=NOW)
    assert memory.get(FILE) == DIGEST


def test_it_is_bounded_and_keeps_what_is_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "MOST_FILES", 8)
    memory = DigestMemory(str(folder))
    files = [FILE._replace(inode=number) for number in range(9)]
    for age, file in enumerate(files[:8]):
        memory.put(file, DIGEST, began_ns=NOW)
        os.utime(folder / f"7-{file.inode:x}", (age, age))
    assert memory.get(files[0]) == DIGEST  # used just now
    memory.put(files[8], DIGEST, began_ns=NOW)
    assert [memory.get(file) is not None for file in files] == [True] + [False] * 3 + [True] * 5


def test_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    default_memory().put(FILE, DIGEST, began_ns=NOW)
    assert len(list((tmp_path / "xdg/kvstrata/weights").iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_memory().get(FILE) is None
    default_memory().put(FILE, DIGEST, began_ns=NOW)
    assert len(list((tmp_path / "home/.cache/kvstrata/weights").iterdir())) == 1
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    default_memory().put(FILE, DIGEST, began_ns=time.time_ns())
    assert not (tmp_path / "relative").exists()
