"""Spans of time as operators write them: `90s`, `30min`, `12h` or `7d`."""

from __future__ import annotations

import re

import typer

_SPAN = re.compile(r"([0-9]{1,9}) ?(s|min|h|d)")
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


def seconds(text: str, what: str, examples: str) -> int:
    """Seconds of a span.

    Args:
        what: it is to be, in a word, for the error.
        examples: for the error.

    Raises:
        typer.BadParameter: it is none.
    """
    match = _SPAN.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is no {what}: give one such as {examples}")
    return int(match[1]) * _SECONDS[match[2]]
