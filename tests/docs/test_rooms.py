"""The tree of rooms in docs/architecture.md names every file of the product, and no other."""

import re
import subprocess
from collections import Counter
from pathlib import PurePosixPath

import pytest

from tests.docs.blocks import ROOT

DOCUMENT = "docs/architecture.md"
FOLDERS = ("kernels", "offload", "tiers")
RUNNERS = {"scheduler", "workers", "I/O", "command line", "all", "benchmark", "tests"}
MOST_ENTRIES = 13  # of a folder: what one can read at a glance
# `  name   phrase` or `  name/   [who, who] phrase`, two spaces a level
_LINE = re.compile(r"( *)(\w+/?) +(?:\[([^]]+)\] )?(\S.*)")


def product() -> set[str]:
    """The files that git knows below the product's folders; without git, those that are there."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", *FOLDERS], cwd=ROOT, capture_output=True, text=True
    )
    names = listed.stdout.split("\0") if listed.returncode == 0 else []
    if not any(names):
        names = [
            str(path.relative_to(ROOT)) for each in FOLDERS for path in (ROOT / each).rglob("*.*")
        ]
    return {name for name in names if name and "__pycache__" not in name and (ROOT / name).exists()}


def tree() -> list[tuple[str, str | None, str]]:
    """Path, who runs it, and phrase of each line; folders end with a slash."""
    text = (ROOT / DOCUMENT).read_text().split("## The rooms", 1)[1]
    block = text.split("```text\n", 1)[1].split("```", 1)[0]
    above: list[str] = []
    found = []
    for line in block.splitlines():
        match = _LINE.fullmatch(line)
        assert match, f"{DOCUMENT}: {line!r} is not of the form `name  [who] phrase`"
        indent, name, who, phrase = match.groups()
        above = above[: len(indent) // 2]
        path = "".join([*above, name])
        found.append((path if name.endswith("/") else f"{path}.py", who, phrase))
        if name.endswith("/"):
            above.append(name)
    return found


def test_every_file_is_in_its_room() -> None:
    files = {name for name in product() if name.endswith(".py")}
    folders = {f"{parent}/" for name in files for parent in PurePosixPath(name).parents} - {"./"}
    there = files | folders
    lines = [path for path, _, _ in tree()]
    missing, unknown = sorted(there - set(lines)), sorted(set(lines) - there)
    twice = [path for path, count in Counter(lines).items() if count > 1]
    assert not (missing or unknown or twice), (
        f"the tree of rooms in {DOCUMENT}: add {missing}, take out {unknown + twice}"
    )


def test_every_folder_says_who_runs_it() -> None:
    for path, who, _ in tree():
        assert who or not path.endswith("/"), f"{DOCUMENT}: {path} lacks [who runs it]"
        for each in (who or "all").split(", "):
            assert each.removeprefix("one ") in RUNNERS, f"{DOCUMENT}: {path}: who is {each!r}?"


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_can_be_read_at_a_glance(folder: str) -> None:
    entries: dict[str, set[str]] = {}
    for name in product() - {f"{folder}/py.typed"}:  # a mark for type checkers
        for parent in PurePosixPath(name).parents:
            inside = PurePosixPath(name).relative_to(parent).parts[0]
            entries.setdefault(str(parent), set()).add(inside)
    for path, names in sorted(entries.items()):
        if PurePosixPath(path).is_relative_to(folder):
            assert len(names) <= MOST_ENTRIES, f"{path}/ has {len(names)} entries: {sorted(names)}"
