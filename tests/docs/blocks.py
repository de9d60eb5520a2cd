"""The code blocks of the documentation, and the shell commands in them.

An indented block is shell commands, or a session: lines that begin with `$ ` are commands then, and
the others what they print. A fenced block says its language.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")],
    key=lambda path: (len(path.parts), path),
)
SHELL = ("sh", "console")

_FENCE = re.compile(r"^\s*```(.*)$")
_LIST = re.compile(r"^\s*(?:[-*+]|\d+[.)])\s")


@dataclass(frozen=True)
class Block:
    """A block of code.

    document: path below the repository's root. line: of its first line, from 1.
    language: of a fenced block, "" if it says none; "sh" for an indented one.
    """

    document: str
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        """`README.md:12`."""
        return f"{self.document}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A shell command, whole: of several lines if it goes on.

    printed: what the session shows as its output, "" if nothing.
    """

    where: str
    text: str
    printed: str = ""

    @property
    def words(self) -> list[str]:
        """As the shell splits it, but nothing is replaced; without comments."""
        return shlex.split(self.text.replace("\\\n", " "), comments=True)


def blocks(path: Path, root: Path = ROOT) -> Iterator[Block]:
    """The code blocks of a document, in order."""
    document = str(path.relative_to(root))
    lines = path.read_text().splitlines()
    position, after_blank, in_list = 0, True, False
    while position < len(lines):
        line = lines[position]
        if fence := _FENCE.match(line):
            end = next(n for n in range(position + 1, len(lines)) if _FENCE.match(lines[n]))
            text = "\n".join(lines[position + 1 : end])
            yield Block(document, position + 2, fence[1].strip(), text)
            position, after_blank = end + 1, False
        elif line.startswith("    ") and after_blank and not in_list:
            end = position
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            text = "\n".join(each[4:] for each in lines[position:end]).rstrip()
            yield Block(document, position + 1, "sh", text)
            position, after_blank = end, True
        else:
            if line.strip():
                in_list = bool(_LIST.match(line)) or (in_list and line.startswith(" "))
            after_blank = not line.strip()
            position += 1


def commands(block: Block) -> list[Command]:
    """The commands of a shell block."""
    lines = block.text.splitlines()
    session = any(line.startswith("$ ") for line in lines)
    found: list[Command] = []
    pending: list[str] = []
    start = 0
    for number, line in enumerate(lines):
        if session and not pending and not line.startswith("$ "):
            if found:
                last = found[-1]
                found[-1] = Command(last.where, last.text, f"{last.printed}{line}\n")
            continue
        if not pending:
            start = number
            line = line.removeprefix("$ ") if session else line
            if not line.strip() or line.lstrip().startswith("#"):
                continue
        pending.append(line)
        text = "\n".join(pending)
        if not _goes_on(text):
            found.append(Command(f"{block.document}:{block.line + start}", text))
            pending = []
    if pending:
        raise ValueError(f"{block.where}: a command has no end: {pending[0]!r}")
    return found


def _goes_on(text: str) -> bool:
    """Whether the shell would read on: an open quote or a backslash at the end."""
    quote = ""
    position = 0
    while position < len(text):
        char = text[position]
        if char == "\\" and quote != "'":
            position += 1
            if position >= len(text):
                return True
        elif quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char == "#" and (position == 0 or text[position - 1].isspace()):
            position = text.find("\n", position)
            if position < 0:
                return False
        position += 1
    return bool(quote)


def shell_commands(documents: list[Path] | None = None, root: Path = ROOT) -> list[Command]:
    """All shell commands of the documents."""
    return [
        command
        for path in (DOCUMENTS if documents is None else documents)
        for block in blocks(path, root)
        if block.language in SHELL
        for command in commands(block)
    ]
