"""The fields of a namespace by name, in which two differ, and their values as short text.

Fields are JSON of any depth. A name is a path in it: `model.rope_scaling.factor`,
`layers[1].dtype`; a key that is no plain word stands in brackets and quotes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile
from typing import Any, NamedTuple

ABSENT = object()  # the value of a field that is not there
_WORD = re.compile(r"[A-Za-z0-9_-]+")
_Path = tuple[str | int, ...]


class Difference(NamedTuple):
    """A field in which two namespaces differ; a value is JSON, or `ABSENT`."""

    name: str
    theirs: object
    ours: object

    def values(self, most: int) -> tuple[str, str]:
        """Theirs and ours as `short` gives them; of long ones that begin alike, where they part."""
        texts = _shown(self.theirs), _shown(self.ours)
        start = 0
        if max(map(len, texts)) > most:
            pairs = zip(*texts, strict=False)
            alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            start = alike - most // 4 if alike > most // 2 else 0
        theirs, ours = (_cut(value, _shown(value), most, start) for value in self[1:])
        return theirs, ours


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[Difference]:
    """The fields that differ, those at the top first, then by name.

    An object that one side lacks is one difference, and so are lists of unequal length; lists of
    equal length are compared by element. Values are what config.json would hold of them, and
    differ where that text does: 1, 1.0 and true are three values.
    """
    found = sorted(
        _differing((), *(json.loads(_text(fields)) for fields in (ours, theirs))),
        key=lambda each: (len(each[0]), [str(step) for step in each[0]]),
    )
    return [Difference(_name(path), theirs, ours) for path, ours, theirs in found]


def leaves(fields: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """(name, value) of each field, by name, in each object the plain ones first.

    A list stays whole unless it holds objects.
    """
    for path, value in _leaves((), fields):
        yield _name(path), value


def short(value: object, most: int) -> str:
    """`value` as JSON, or "absent", cut where it has more than `most` characters."""
    return _cut(value, _shown(value), most, 0)


def _differing(path: _Path, ours: Any, theirs: Any) -> Iterator[tuple[_Path, Any, Any]]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in ours.keys() | theirs.keys():
            yield from _differing((*path, key), ours.get(key, ABSENT), theirs.get(key, ABSENT))
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from _differing((*path, index), *pair)
    elif type(ours) is not type(theirs) or repr(ours) != repr(theirs):  # NaN is not equal to NaN
        yield path, ours, theirs


def _leaves(path: _Path, value: Any) -> Iterator[tuple[_Path, object]]:
    inner: Iterable[tuple[str | int, Any]] = ()
    if isinstance(value, Mapping):
        inner = sorted(value.items(), key=lambda item: (isinstance(item[1], dict), item[0]))
    elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
        inner = enumerate(value)
    leaf = True
    for step, each in inner:
        leaf = False
        yield from _leaves((*path, step), each)
    if leaf and path:
        yield path, value


def _name(path: _Path) -> str:
    parts = []
    for step in path:
        if isinstance(step, str) and _WORD.fullmatch(step):
            parts.append(f".{step}")
        else:
            parts.append(f"[{json.dumps(step)}]")
    return "".join(parts).removeprefix(".")


def _text(value: object) -> str:
    """JSON with sorted keys, also of the NaN that a foreign file may hold."""
    return json.dumps(value, sort_keys=True)


def _shown(value: object) -> str:
    return "absent" if value is ABSENT else _text(value)


def _cut(value: object, text: str, most: int, start: int) -> str:
    """`most` characters of `text` from `start`; of a list or object also how much it holds."""
    end = len(text) if len(text) - start <= most else start + most
    cut = f"{'...' if start else ''}{text[start:end]}{'...' if end < len(text) else ''}"
    if cut == text or not isinstance(value, dict | list):
        return cut
    return f"{cut} ({len(value)} {'fields' if isinstance(value, dict) else 'items'})"
