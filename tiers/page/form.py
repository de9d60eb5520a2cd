"""The bytes of a page's file: a safetensors header of fixed form, then the page.

The header of a page is determined by its key, namespace and layout up to the checksum,
which stands at a fixed offset. A file is therefore checked by comparing bytes; parsing is
needed only to name what is wrong, and for readers that do not know what to expect.
"""

from __future__ import annotations

import functools
import json
import struct
from dataclasses import dataclass
from typing import Any

import xxhash

from kvstrata.tiers.base import DTYPE_BYTES, PageLayout, TensorSpec, key_group

FORMAT_VERSION = "1"
ALIGNMENT = 4096  # the data begins at a multiple of this: what O_DIRECT needs everywhere
MAX_HEADER_BYTES = 2**20  # including the 8 length bytes; far above what any layout needs

_MAX_AXES = 8  # of a tensor; the pages here have four at most
_CHECKSUM_NAME = "xxh3_128"
_CHECKSUM_START = 8 + len('{"__metadata__":{"checksum":"')
_CHECKSUM_END = _CHECKSUM_START + len(_CHECKSUM_NAME) + 1 + 32
_NO_CHECKSUM = f"{_CHECKSUM_NAME}:{0:032x}"
_METADATA = ["checksum", "format_version", "group", "key", "namespace", "tokens"]


class BadPage(Exception):
    """A file is not the page it should be; `cause` is a short word that is counted."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(f"{cause}: {detail:.200}")
        self.cause = cause
        self.detail = f"{detail:.200}"


@dataclass(frozen=True, slots=True)
class FileHeader:
    """What a page file's header says."""

    key: bytes
    namespace: str
    layout: PageLayout
    checksum: str

    def encode(self) -> bytes:
        """The only byte sequence that says this; see `encode_header`."""
        return encode_header(self.key, self.namespace, self.layout, self.checksum)


def page_checksum(data: Any) -> str:
    """`xxh3_128:<32 hex digits>` of a contiguous buffer; the GIL is released meanwhile."""
    return format_checksum(xxhash.xxh3_128_hexdigest(data))


def format_checksum(digest: str) -> str:
    """The checksum's text in the header, from the 32 hex digits of XXH3-128."""
    return f"{_CHECKSUM_NAME}:{digest}"


def encode_header(
    key: bytes, namespace: str, layout: PageLayout, checksum: str = _NO_CHECKSUM
) -> bytes:
    """The file's first bytes, up to the data; their number is a multiple of `ALIGNMENT`.

    Args:
        key: the page's offload key.
        namespace: the namespace's digest.
        layout: the tensors of the page.
        checksum: what `page_checksum` gives for the page.
    """
    template, position = _template(len(key), key_group(key), namespace, layout)
    text = key.hex().encode()
    parts = (template[:_CHECKSUM_START], checksum.encode(), template[_CHECKSUM_END:position])
    return b"".join((*parts, text, template[position + len(text) :]))


@functools.lru_cache(maxsize=256)
def _template(key_bytes: int, group: int, namespace: str, layout: PageLayout) -> tuple[bytes, int]:
    """The header of a key of zeros without checksum, and where its key stands."""
    header: dict[str, Any] = {
        "__metadata__": {
            "checksum": _NO_CHECKSUM,
            "format_version": FORMAT_VERSION,
            "group": str(group),
            "key": bytes(key_bytes).hex(),
            "namespace": namespace,
            "tokens": str(layout.tokens),
        }
    }
    start = 0
    for tensor in layout.tensors:
        end = start + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text, 8 + text.index(b'"key":"') + len('"key":"')


def header_bytes(start: bytes) -> int:
    """Size of the header, with its 8 length bytes, from the first 8 bytes of a file.

    Raises:
        BadPage: fewer than 8 bytes ("truncated"), or not a length that this format has.
    """
    if len(start) < 8:
        raise BadPage("truncated", "the file has fewer than 8 bytes")
    size = 8 + int(struct.unpack_from("<Q", start)[0])
    if size > MAX_HEADER_BYTES or size % ALIGNMENT:
        raise BadPage("header", f"its first 8 bytes give {size - 8} as the header's length")
    return size


def verify_header(raw: bytes, key: bytes, namespace: str, layout: PageLayout) -> str:
    """The checksum in the header `raw`, if all else in it is as it must be.

    Raises:
        BadPage: "version", "namespace", "key", "shape", or "header" for anything else.
    """
    expected = encode_header(key, namespace, layout)
    same_start = raw[:_CHECKSUM_START] == expected[:_CHECKSUM_START]
    if same_start and raw[_CHECKSUM_END:] == expected[_CHECKSUM_END:]:
        return raw[_CHECKSUM_START:_CHECKSUM_END].decode("ascii", "replace")
    found = parse_header(raw)
    if found.namespace != namespace:
        raise BadPage("namespace", f"of namespace {found.namespace!r}")
    if found.key != key:
        raise BadPage("key", f"the page of key {found.key.hex()}")
    if found.layout != layout:
        raise BadPage("shape", f"holds {found.layout}")
    raise BadPage("header", "not in the form of this format")


def parse_header(raw: bytes) -> FileHeader:
    """Read a header of which nothing is known; `raw` is all of it, with its length bytes.

    Raises:
        BadPage: "version" for another format version, "header" for anything unreadable.
    """
    try:
        fields = json.loads(raw[8:])
        metadata = fields.pop("__metadata__")
        if metadata["format_version"] != FORMAT_VERSION:
            raise BadPage("version", f"format version {metadata['format_version']!r}")
        if sorted(metadata) != _METADATA or not all(type(v) is str for v in metadata.values()):
            raise BadPage("header", "the fields of __metadata__ are not those of a page")
        checksum = metadata["checksum"]
        if len(checksum) != len(_NO_CHECKSUM) or not checksum.isascii():
            raise BadPage("header", "the checksum is not in the form of one")
        tensors, start = [], 0
        for name, entry in fields.items():
            tensor = _tensor(name, entry, start)
            tensors.append(tensor)
            start += tensor.nbytes
        header = FileHeader(
            key=bytes.fromhex(metadata["key"]),
            namespace=metadata["namespace"],
            layout=PageLayout(tuple(tensors), int(metadata["tokens"])),
            checksum=checksum,
        )
        if metadata["group"] != str(key_group(header.key)):
            raise BadPage("header", "the group is not the one in the key")
        return header
    except KeyError as error:
        raise BadPage("header", f"the header lacks the field {error.args[0]!r}") from None
    except RecursionError:
        raise BadPage("header", "the header is nested too deep") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise BadPage("header", "the header is not JSON") from None
    except (ValueError, TypeError, AttributeError):
        raise BadPage("header", "the values in the header are not those of a page") from None


def _tensor(name: str, entry: Any, start: int) -> TensorSpec:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets]
    # a product of many or of long numbers would take seconds of a thread that holds the GIL
    short = len(shape) <= _MAX_AXES and all(n < 2**63 for n in shape)
    if dtype not in DTYPE_BYTES or not all(type(n) is int and n >= 0 for n in numbers) or not short:
        raise BadPage("header", f"tensor {name!r:.50} has a wrong dtype, shape or place")
    tensor = TensorSpec(name, dtype, tuple(shape))
    if offsets != [start, start + tensor.nbytes]:
        raise BadPage("header", f"tensor {name!r:.50} is not where it must be")
    return tensor
