"""Traces of requests: when each came, how long it was, and which chunks it consists of.

Three forms are read, one JSON object a line; which one it is, its first line says:

- Mooncake's: `timestamp` in ms, `input_length`, `output_length`, `hash_ids` of 512 tokens each;
- Qwen-Bailian's: the same with `timestamp` in s, `hash_ids` of 16 tokens, and `chat_id`;
- our own: a first line `{"kvstrata_recording": 1, "tokens_per_chunk": ..., ...}`, and then lines
  like Mooncake's, whose hashes are numbers or hexadecimal digits.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TextIO

import msgspec

from kvstrata.offload.metering.recording import VERSION_KEY
from kvstrata.tiers.base import PageKey
from kvstrata.tiers.options import ConfigError

MOONCAKE_TOKENS, BAILIAN_TOKENS = 512, 16  # of a hash
_MOST_TOKENS = 2**31
_GZIP = b"\x1f\x8b"  # begins a file that gzip packed


class TraceError(ConfigError):
    """A trace cannot be read: the message names the file, the line and what is wrong there."""


class Request(msgspec.Struct, gc=False):
    """One request of a trace.

    Attributes:
        at: when it comes, in seconds after the first.
        tokens: of its prompt.
        generated: tokens that it generates.
        keys: of the whole chunks of its prompt, in prefix order.
        behind: of those behind them, with what it generated, where the trace says it.
    """

    at: float
    tokens: int
    generated: int
    keys: list[PageKey]
    behind: list[PageKey] = []


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival.

    Attributes:
        tokens_per_chunk: of each key.
        bytes_per_chunk: of each page; None where the trace does not say.
        model: whose requests these are, "" where the trace does not say.
        cut_line: the number of the last line, where that was cut and is left out.
    """

    requests: Sequence[Request]
    tokens_per_chunk: int
    bytes_per_chunk: int | None = None
    model: str = ""
    cut_line: int | None = None

    @property
    def chunks(self) -> int:
        """Chunks of all requests."""
        return sum(len(request.keys) for request in self.requests)

    @property
    def tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(request.tokens for request in self.requests)


def read_trace(path: str, tokens_per_chunk: int | None = None) -> Trace:
    """Read a trace.

    Args:
        path: of the file.
        tokens_per_chunk: join so many tokens in a chunk, a multiple of those of a hash; None: as
            many as a hash has.

    Raises:
        TraceError: the file is no trace; names it, the line and what is wrong.
        OSError: it cannot be read.
    """
    with open_trace(path) as file:
        return parse_trace(path, file, tokens_per_chunk)


def open_trace(path: str) -> TextIO:
    """The lines of a trace, which may be a pipe: it is opened once.

    Raises:
        TraceError: it is packed.
        OSError: it cannot be read.
    """
    file = open(path, "rb")  # noqa: SIM115
    try:
        packed = file.peek(len(_GZIP)).startswith(_GZIP)
    except OSError:
        file.close()
        raise
    if packed:
        file.close()
        raise TraceError(f"{path}: it is packed; give the file that gunzip makes of it")
    return io.TextIOWrapper(file, encoding="utf-8", errors="replace")


def parse_trace(name: str, lines: Iterable[str], tokens_per_chunk: int | None = None) -> Trace:
    """As `read_trace`, from lines as a file has them; `name` stands for the file in errors.

    Raises:
        TraceError: see there.
    """
    read = _Rows(name, lines)
    rows = iter(read)
    first = next(rows, None)
    if first is None:
        raise TraceError(f"{name}: there is no request in it; give a trace, one JSON object a line")
    number, head = first
    header: Mapping[str, Any] = {}
    per_second = 1000.0
    tokens = MOONCAKE_TOKENS
    if VERSION_KEY in head:
        header = _header(name, number, head)
        tokens = header["tokens_per_chunk"]
    else:
        rows = chain([first], rows)
        if "chat_id" in head:
            per_second, tokens = 1.0, BAILIAN_TOKENS
    joined = _joined(name, tokens, tokens_per_chunk)
    keys = _Keys(joined)
    requests = [
        _request(name, at, row, per_second, tokens, keys, recorded=bool(header)) for at, row in rows
    ]
    if not requests:
        raise TraceError(f"{name}: there is no request in it; give a trace with at least one")
    requests.sort(key=lambda request: request.at)
    begin = requests[0].at
    for request in requests:
        request.at -= begin
    nbytes = header.get("bytes_per_chunk")
    return Trace(
        requests,
        tokens * joined,
        None if nbytes is None else nbytes * joined,
        str(header.get("model", "")),
        read.cut_line,
    )


class _Keys:
    """Names chunks. Equal hashes may have different prefixes (Qwen-Bailian's say only what is in
    a block), as those of vLLM's keys cannot: so a name stands for a hash and all before it."""

    def __init__(self, joined: int) -> None:
        self.joined = joined
        self._numbers: dict[tuple[int, object], int] = {}
        self._names: dict[int, bytes] = {}

    def of(self, hashes: Sequence[object]) -> list[bytes]:
        """The keys of the whole chunks of a prompt."""
        number, keys, numbers, joined = 0, [], self._numbers, self.joined
        for at, each in enumerate(hashes[: len(hashes) // joined * joined], 1):
            number = numbers.setdefault((number, each), len(numbers) + 1)
            if at % joined == 0:
                # one object for a key, wherever it is asked for
                key = self._names.get(number)
                if key is None:
                    key = self._names[number] = number.to_bytes(8, "big") + bytes(4)
                keys.append(key)
        return keys


class _Rows:
    """Number and object of each line that is not empty."""

    def __init__(self, name: str, lines: Iterable[str]) -> None:
        self._name, self._lines = name, lines
        self.cut_line: int | None = None

    def __iter__(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        for number, line in enumerate(self._lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                if number > 1 and not line.endswith("\n"):  # whoever wrote it was stopped there
                    self.cut_line = number
                    return
                wrong = _wrong(self._name, number, "it is no JSON", "one JSON object a line")
                raise wrong from None
            if not isinstance(row, dict):
                raise _wrong(self._name, number, "it is no object", "one JSON object a line")
            yield number, row


def _header(name: str, number: int, head: Mapping[str, Any]) -> Mapping[str, Any]:
    if head[VERSION_KEY] != 1:
        text = f"{VERSION_KEY}: {head[VERSION_KEY]!r} is a form that is not known here"
        raise _wrong(name, number, text, "a recording of version 1, or use a newer kvstrata")
    for key, needed in (("tokens_per_chunk", True), ("bytes_per_chunk", False)):
        if needed or head.get(key) is not None:
            _count(name, number, head, key, least=1)
    return head


def _joined(name: str, tokens: int, wanted: int | None) -> int:
    """How many hashes make a chunk."""
    if wanted is None:
        return 1
    if wanted < tokens or wanted % tokens:
        raise TraceError(
            f"{name}: its hashes are of {tokens} tokens each, so a chunk cannot have {wanted}; "
            f"give a multiple of {tokens}"
        )
    return wanted // tokens


def _request(
    name: str,
    number: int,
    row: Mapping[str, Any],
    per_second: float,
    tokens: int,
    keys: _Keys,
    *,
    recorded: bool,
) -> Request:
    length = _count(name, number, row, "input_length", least=1)
    generated = _count(name, number, row, "output_length", least=0)
    at = row.get("timestamp")
    if not isinstance(at, int | float) or isinstance(at, bool) or not 0 <= at < 2**60:
        raise _wrong(name, number, f"timestamp: {at!r}", "a number that is not negative")
    hashes = row.get("hash_ids")
    if not isinstance(hashes, list) or not all(type(each) in (int, str) for each in hashes):
        raise _wrong(name, number, f"hash_ids: {_short(hashes)}", "a list of numbers or strings")
    whole = length // tokens
    if len(hashes) < whole:
        text = f"hash_ids: {len(hashes)} for {length} tokens"
        raise _wrong(name, number, text, f"one for each {tokens} of them, {whole} at least")
    # In a recording all are of whole chunks; else the last one may be of fewer tokens, and no chunk
    # is stored before it is full.
    found = keys.of(hashes if recorded else hashes[:whole])
    ours = whole // keys.joined
    return Request(at / per_second, length, generated, found[:ours], found[ours:])


def _count(name: str, number: int, row: Mapping[str, Any], key: str, *, least: int) -> int:
    value = row.get(key)
    if type(value) is not int or not least <= value < _MOST_TOKENS:
        remedy = f"a whole number from {least} to {_MOST_TOKENS - 1:,}"
        raise _wrong(name, number, f"{key}: {_short(value)}", remedy)
    return value


def _wrong(name: str, number: int, what: str, remedy: str) -> TraceError:
    return TraceError(f"{name}: line {number}: {what}; give {remedy}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
