"""How commands are found in documents."""

from pathlib import Path

import pytest

from tests.docs.blocks import blocks, shell_commands

DOCUMENT = """# Title

Text, and a list:

- item

    that goes on and is no code

Then:

    one --option 'of
      two lines'   # and a comment with it's quote
    two \\
      lines

    # a comment
    three

    $ four
    printed

    by four
    $ five

Text.

```json
{"a": 1}
```

```sh
six
```
"""


def test_commands_are_found(tmp_path: Path) -> None:
    path = tmp_path / "d.md"
    path.write_text(DOCUMENT.replace("    $ four\n    printed\n\n    by four\n    $ five\n", ""))
    found = shell_commands([path], tmp_path)
    assert [command.text for command in found] == [
        "one --option 'of\n  two lines'   # and a comment with it's quote",
        "two \\\n  lines",
        "three",
        "six",
    ]
    assert [command.where for command in found] == ["d.md:11", "d.md:13", "d.md:17", "d.md:27"]


def test_a_session_is_commands_and_what_they_print(tmp_path: Path) -> None:
    path = tmp_path / "d.md"
    path.write_text("It says\n\n    $ four 'a\n    b'\n    printed\n\n    by four\n    $ five\n")
    found = shell_commands([path], tmp_path)
    assert [(command.text, command.printed) for command in found] == [
        ("four 'a\nb'", "printed\n\nby four\n"),
        ("five", ""),
    ]


def test_a_command_without_an_end(tmp_path: Path) -> None:
    path = tmp_path / "d.md"
    path.write_text("    say 'it\n\nText.\n")
    with pytest.raises(ValueError, match=r"d\.md:1: a command has no end: \"say 'it\""):
        shell_commands([path], tmp_path)


def test_a_block_says_its_language(tmp_path: Path) -> None:
    path = tmp_path / "d.md"
    path.write_text("```\na\n```\n\n``` python\nb\n```\n")
    assert [(block.language, block.text, block.line) for block in blocks(path, tmp_path)] == [
        ("", "a", 2),
        ("python", "b", 6),
    ]
