"""The filesystem tier keeps the contract; the files are also read and written independently."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import xxhash

from kvstrata.tiers.base import SecondaryTier, TierContext
from kvstrata.tiers.fs.files.namespace import namespace_paths
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.testing import MakeTier, TierContract


def written_by_the_book(context: TierContext, digest: str, key: bytes, data: bytes) -> bytes:
    """A page file as docs/format.md describes it."""
    layout = context.layouts[int.from_bytes(key[-4:], "big")]
    metadata = {
        "checksum": "xxh3_128:" + xxhash.xxh3_128(data).hexdigest(),
        "format_version": "1",
        "group": str(int.from_bytes(key[-4:], "big")),
        "key": key.hex(),
        "namespace": digest,
        "tokens": str(layout.tokens),
    }
    header: dict[str, object] = {"__metadata__": metadata}
    position = 0
    for tensor in layout.tensors:
        offsets = [position, position + tensor.nbytes]
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": [*tensor.shape],
            "data_offsets": offsets,
        }
        position = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-(8 + len(text)) // 4096) * 4096 - 8, b" ")
    return struct.pack("<Q", len(text)) + text + data


class FileMedium:
    """The files below a root, read by the official library."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, tier: SecondaryTier, context: TierContext, key: bytes, data: bytes) -> None:
        path = self._path(context, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = namespace_paths("/", context.model, context.namespace).name[-12:]
        path.write_bytes(written_by_the_book(context, digest, key, data))

    def get(self, tier: SecondaryTier, context: TierContext, key: bytes) -> bytes | None:
        path = self._path(context, key)
        if not path.exists():
            return None
        tensors = dict(safetensors.deserialize(path.read_bytes()))
        layout = context.layouts[int.from_bytes(key[-4:], "big")]
        for spec in layout.tensors:
            assert tensors[spec.name]["dtype"] == spec.dtype
            assert tuple(tensors[spec.name]["shape"]) == spec.shape
        return b"".join(bytes(tensors[spec.name]["data"]) for spec in layout.tensors)

    def _path(self, context: TierContext, key: bytes) -> Path:
        name = key[:-4].hex()
        group = int.from_bytes(key[-4:], "big")
        home = namespace_paths(str(self.root), context.model, context.namespace).name
        place = f"{home}_r0/{name[:3]}/{name[3:5]}_g{group}/{name}.safetensors"
        return self.root / place


class TestFsTier(TierContract):
    @pytest.fixture(params=["auto", "buffered"])
    def make_tier(
        self, request: pytest.FixtureRequest, open_tier: Callable[..., FsTier]
    ) -> MakeTier:
        return lambda context: open_tier(context, io=request.param)

    @pytest.fixture
    def medium(self, root: Path) -> FileMedium:
        return FileMedium(root)
