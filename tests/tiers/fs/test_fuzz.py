"""Whatever bytes lie below a root, their readers say so and stop: in bounded time and memory.

`READERS` are properties of any bytes; `make fuzz` gives them to a coverage-guided fuzzer.
"""

import json
import math
import struct
import tempfile
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.tiers.base import DTYPE_BYTES, layouts_from_json
from kvstrata.tiers.fs.budget import snapshot
from kvstrata.tiers.fs.budget.catalog import Catalog
from kvstrata.tiers.fs.budget.journal import RECORD_BYTES, Op, Record, decode, read_namespace
from kvstrata.tiers.fs.budget.ledger import Books, Row
from kvstrata.tiers.fs.budget.limits import Limits, file_cost
from kvstrata.tiers.fs.budget.names import Names
from kvstrata.tiers.fs.files.namespace import read_config
from kvstrata.tiers.fs.tools.scan import inspect_file
from kvstrata.tiers.page.form import (
    ALIGNMENT,
    MAX_HEADER_BYTES,
    BadPage,
    encode_header,
    header_bytes,
    page_checksum,
    parse_header,
    verify_header,
)
from kvstrata.tiers.page.identity import canonical_json, namespace_digest
from kvstrata.tiers.testing import CONTEXT, make_data, make_key

KEY = make_key(1)
LAYOUT = CONTEXT.layouts[0]
DIGEST = namespace_digest(CONTEXT.namespace)
PAGE = make_data(1, LAYOUT.nbytes)
HEADER = encode_header(KEY, DIGEST, LAYOUT, page_checksum(PAGE))
SCRATCH = Path(tempfile.mkdtemp(prefix="kvstrata-fuzz-"))
CONFIG = SCRATCH / "config.json"
FILE = SCRATCH / "page"


def read_header(raw: bytes) -> None:
    """The header of a file that is to be the page of KEY, or of whatever it names."""
    with suppress(BadPage):
        assert ALIGNMENT <= header_bytes(raw[:8]) <= MAX_HEADER_BYTES
    with suppress(BadPage):
        checksum = verify_header(raw, KEY, DIGEST, LAYOUT)
        if len(checksum) == 41 and checksum.isascii():
            assert raw == encode_header(KEY, DIGEST, LAYOUT, checksum)
    with suppress(BadPage):
        found = parse_header(raw)
        assert found.layout.nbytes >= 0
        again = found.encode()
        assert parse_header(again) == found and parse_header(again).encode() == again


def read_file(raw: bytes) -> None:
    """A whole file, as the command line sees it."""
    FILE.write_bytes(raw)
    report = inspect_file(str(FILE))
    if report.cause is None:
        assert report.header is not None and raw.startswith(report.header.encode())


def read_fields(raw: bytes) -> None:
    """A config.json."""
    CONFIG.write_bytes(raw)
    try:
        fields = read_config(str(CONFIG))
        canonical_json(fields)
        namespace_digest(fields)
    except ValueError:
        return
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        layouts_from_json(fields["pages"])


def read_ledger(raw: bytes) -> None:
    """The ledger, as it is and with a checksum that fits."""
    for content in (raw, raw + xxhash.xxh3_64_digest(raw)):
        books = Books.decode(content)
        if books != Books():
            assert len(books.encode()) <= len(content)  # a server may have come twice
        books.limits()


def read_journal(raw: bytes) -> None:
    """A journal, with the namespace in front."""
    read_namespace(raw)
    found = list(decode(raw))
    assert len(found) == len(raw) // RECORD_BYTES
    for number, record in enumerate(found):
        if record is not None:
            at = number * RECORD_BYTES
            assert len(record.encode()) == len(raw[at : at + RECORD_BYTES])


def framed(header: bytes, pieces: bytes = b"") -> bytes:
    """A snapshot whose header has the right checksum."""
    start = struct.pack("<8sI", b"kvsnaps1", len(header)) + header
    return start + xxhash.xxh3_64_digest(start) + pieces


def read_snapshot(raw: bytes) -> None:
    """A snapshot as it is, and one with these bytes as its header."""
    for content in (raw, framed(raw)):
        (SCRATCH / snapshot.SNAPSHOT_NAME).write_bytes(content)
        catalog, names, *_ = snapshot.load(str(SCRATCH))
        assert 18 * len(catalog) <= len(content)
        for chunk, *_ in catalog.chunks(2**14):
            for name in chunk:
                names.path(name)


def a_snapshot() -> bytes:
    catalog = Catalog()
    for number in range(20):
        catalog.add(b"\0\0" + make_key(number), 8192, 10**18 + number, number)
    snapshot.save(str(SCRATCH), catalog, Names(["m_0123456789ab"]), {bytes(16): (1, 9)}, 0o600)
    return (SCRATCH / snapshot.SNAPSHOT_NAME).read_bytes()


SERVERS = {bytes([n] * 16): Row(b"0123456789ab", Limits(1, 2, 3), n, True) for n in range(3)}
READERS: dict[str, Callable[[bytes], None]] = {
    "header": read_header,
    "file": read_file,
    "config": read_fields,
    "ledger": read_ledger,
    "journal": read_journal,
    "snapshot": read_snapshot,
    "snapshot header": read_snapshot,
}
SEEDS: dict[str, bytes] = {
    "header": HEADER,
    "file": HEADER + PAGE,
    "config": json.dumps(dict(CONTEXT.namespace)).encode(),
    "ledger": Books(bytes(16), True, b"x" * 12, 1, 2, 3, 4, SERVERS).encode()[:-8],
    "journal": b"".join(Record(op, KEY, 1, 2, 3).encode() for op in Op),
    "snapshot": a_snapshot(),
    "snapshot header": b'{"namespaces":["m_0123456789ab"],"journals":{"00":[1,168]}}',
}

# What parsers trip over: numbers at the limits, text that is no text, marks of other encodings.
TOKENS = [
    *(b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b'"\\ud800"', b"\\u0000", b"[" * 2000),
    *(b"{" * 2000, b"9" * 5000, b"-1", b"1e999", b"NaN", b"Infinity", b"true", b"null", b"_"),
    *(struct.pack("<Q", n) for n in (0, 1, 4088, 8184, 2**20, 2**31, 2**63 - 1, 2**64 - 1)),
    *(b'{"a":1,"a":2}', b'"__metadata__":', b'"kv":{}', b" ", b"\t", b",", b'"', b"[]", b"{}"),
]


@st.composite
def mutated(draw: st.DrawFn, seed: bytes) -> bytes:
    """The seed with some places overwritten, cut out, repeated or filled with tokens."""
    raw = seed
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(raw)))
        end = min(len(raw), start + draw(st.integers(0, 64)))
        new = draw(st.sampled_from(TOKENS) | st.binary(max_size=16) | st.just(raw[start:end] * 2))
        raw = raw[:start] + new + raw[end:]
    return raw


numbers = st.integers() | st.sampled_from([2**31, 2**63, 2**64, 10**4000, -1, 0]) | st.floats()
texts = st.text(st.characters(exclude_categories=()), max_size=8)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
tensors = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(DTYPE_BYTES)) | values,
        "shape": st.lists(st.integers(0, 8) | numbers, max_size=12) | values,
        "data_offsets": st.lists(st.integers(0, 99) | numbers, max_size=3) | values,
    }
)
metadata = st.fixed_dictionaries(
    {
        "checksum": st.just(page_checksum(b"")) | texts | values,
        "format_version": st.just("1") | values,
        "group": st.just("0") | texts,
        "key": st.just(KEY.hex()) | st.binary(max_size=9).map(bytes.hex) | texts,
        "namespace": st.just(DIGEST) | texts | values,
        "tokens": st.sampled_from(["16", "-1", "1_6", " 16", "9" * 4000, "\u0661"]) | texts,
    }
)
headers = st.fixed_dictionaries(
    {"__metadata__": metadata | values},
    optional={"kv": tensors | values, "kv1": tensors, "\ud800": tensors},
)
snapshots = st.fixed_dictionaries(
    {
        "namespaces": st.lists(st.just("m_0123456789ab") | values, max_size=3) | values,
        "journals": st.dictionaries(
            st.just("00" * 16) | texts, st.lists(numbers, max_size=3) | values, max_size=3
        )
        | values,
    }
)
namespaces = st.fixed_dictionaries(
    {"pages": st.dictionaries(texts, values, max_size=2) | values, "x": values}
)


def as_header(fields: Any) -> bytes:
    text = json.dumps(fields).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


GRAMMARS: dict[str, st.SearchStrategy[bytes]] = {
    "header": headers.map(as_header),
    "file": headers.map(as_header),
    "config": namespaces.map(json.dumps).map(str.encode),
    "snapshot header": snapshots.map(json.dumps).map(str.encode),
}


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
def test_mutated(name: str, data: st.DataObject) -> None:
    READERS[name](data.draw(mutated(SEEDS[name])))


@pytest.mark.parametrize(
    "position", ["[Infinity,1]", "[1,-Infinity]", "[NaN,1]", "[1]", "5", "[[]]"]
)
def test_a_position_that_is_none(position: str) -> None:
    read_snapshot(b'{"namespaces":[],"journals":{"00":%s}}' % position.encode())


@pytest.mark.parametrize("name", GRAMMARS)
@given(data=st.data())
def test_grammar(name: str, data: st.DataObject) -> None:
    READERS[name](data.draw(GRAMMARS[name]))


def many_numbers() -> bytes:
    shape = [10**18] * 50_000
    fields = {"__metadata__": json.loads(HEADER[8:])["__metadata__"]}
    return as_header({**fields, "kv": {"dtype": "U8", "shape": shape, "data_offsets": [0, 1]}})


def giant(pattern: bytes) -> bytes:
    text = pattern * (MAX_HEADER_BYTES // len(pattern) - 8)
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


GIANTS = {
    "shape": many_numbers(),
    "nested": giant(b"["),
    "digits": giant(b"9"),
    "objects": giant(b'{"a":'),
    "text": giant(b'"\\ud800'),
    "list": giant(b"[[],"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("raw", GIANTS.values(), ids=GIANTS)
def test_giants_cost_little(reader: str, raw: bytes) -> None:
    """1 MiB at its worst takes no large multiple of that in memory."""
    tracemalloc.start()
    try:
        READERS[reader](raw)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**26


@pytest.mark.parametrize("shape", [[1] * 9, [2**63], [10**18] * 50_000], ids=len)
def test_a_shape_that_takes_long_to_multiply_is_refused(shape: list[int]) -> None:
    fields = {"dtype": "U8", "shape": shape, "data_offsets": [0, math.prod(shape[:9])]}
    metadata = json.loads(HEADER[8:])["__metadata__"]
    with pytest.raises(BadPage, match="a wrong dtype, shape or place"):
        parse_header(as_header({"__metadata__": metadata, "kv": fields}))


def test_a_checksum_that_is_no_text() -> None:
    fields = json.loads(HEADER[8:])
    fields["__metadata__"]["checksum"] = "\ud800" * 41
    FILE.write_bytes(as_header(fields) + PAGE)
    assert inspect_file(str(FILE)).cause == "header"


@pytest.mark.parametrize("size", [2**44, 2**62])
def test_a_sparse_file_fits_into_the_books(size: int) -> None:
    catalog = Catalog()
    catalog.seen(b"\0\0" + KEY, file_cost(size), 1)
    assert Books(base_bytes=2**20 * catalog.nbytes).encode()


def test_a_claimed_size_is_not_allocated() -> None:
    """Length fields that promise gigabytes, in files of some bytes."""
    big = struct.pack("<I", 2**32 - 1)
    for reader, raw in (
        ("file", struct.pack("<Q", 2**62)),
        ("snapshot", b"kvsnaps1" + big),
        ("snapshot", framed(b'{"namespaces":[],"journals":{}}', big + big)),
        ("ledger", SEEDS["ledger"][:69] + big),
    ):
        tracemalloc.start()
        READERS[reader](raw)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**25
