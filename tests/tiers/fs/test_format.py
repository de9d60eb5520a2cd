"""The bytes on the disk: by the official library, and by what docs/format.md promises."""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from kvstrata.tiers.base import DTYPE_BYTES, PageLayout, TensorSpec, TierContext
from kvstrata.tiers.fs.files.layout import NamespacePaths
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.page.form import MAX_HEADER_BYTES, encode_header, page_checksum, parse_header
from kvstrata.tiers.page.identity import (
    MAX_HASH_BYTES,
    canonical_json,
    directory_name,
    is_key,
    namespace_digest,
)
from kvstrata.tiers.testing import CONTEXT, Slots, finish, make_data, make_job, make_key, store

DOCUMENT = (Path(__file__).parents[3] / "docs/format.md").read_text()

SHAPES = [
    PageLayout((TensorSpec("kv", "F32", (4, 2, 16, 128)),), 16),
    PageLayout((TensorSpec("kv", "F32", (1, 3, 32, 72)),), 32),  # MLA
    PageLayout((TensorSpec("kv", "U8", (4, 2, 1, 16384)),), 32),  # slabs per head
    PageLayout((TensorSpec("kv", "U8", (2, 1001)),), 16),  # opaque
    PageLayout((TensorSpec("kv", "F32", (2, 2, 8, 6)), TensorSpec("kv1", "U8", (1, 1, 8, 3))), 8),
]


@pytest.mark.parametrize("layout", SHAPES, ids=str)
def test_the_official_library_reads_the_tensors(
    open_tier: Callable[..., FsTier], root: Path, layout: PageLayout
) -> None:
    context = TierContext("model", {"a": 1}, {0: layout})
    data = make_data(3, layout.nbytes)
    slots = Slots.make(1, layout.nbytes)
    slots.view(0)[:] = data
    tier = open_tier(context)
    tier.submit_store(make_job(1, [make_key(1)], slots, context))
    assert not finish(tier)[0].failed
    (path,) = root.rglob("*.safetensors")
    position = 0
    with safe_open(path, framework="numpy") as file:
        assert file.metadata()["key"] == make_key(1).hex()
        for spec in layout.tensors:
            found = file.get_tensor(spec.name)
            assert found.shape == spec.shape
            assert found.dtype == {"F32": np.float32, "U8": np.uint8}[spec.dtype]
            assert found.tobytes() == data[position : position + spec.nbytes]
            position += spec.nbytes
    assert position == layout.nbytes


def test_the_place_of_a_page(open_tier: Callable[..., FsTier], root: Path) -> None:
    key = bytes.fromhex("0123456789abcdef") + (1).to_bytes(4, "big")
    store(open_tier(), {key: make_data(1, CONTEXT.layouts[1].nbytes)})
    text = json.dumps(CONTEXT.namespace, sort_keys=True, separators=(",", ":"))
    home = f"org_model_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    assert (root / f"{home}_r0/012/34_g1/0123456789abcdef.safetensors").is_file()
    assert (root / home / "config.json").is_file()


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("org/model-1.5_x", "org_model-1.5_x_D"),
        ("/srv/models/é x", "_srv_models___x_D"),
        ("../../etc", "______etc_D"),
        ("..", "___D"),
        ("a\0b\nc", "a_b_c_D"),
        ("m" * 300, "m" * 128 + "_D"),
        ("", "_D"),
    ],
)
def test_directory_name(model: str, name: str) -> None:
    assert directory_name(model, "D") == name


@pytest.mark.parametrize("size", [0, 3, 4, 6, 7, 12, 36, MAX_HASH_BYTES + 4, MAX_HASH_BYTES + 5])
def test_is_key(size: int) -> None:
    assert is_key(bytes(size)) == (7 <= size <= MAX_HASH_BYTES + 4)
    if is_key(bytes(size)):
        name = NamespacePaths("/r", "m_d").page(b"\xff" * size).rpartition("/")[2]
        assert len(f"{10**19}-not-regular-{name}") <= 255  # also in the quarantine


def test_digest_ignores_the_order_of_fields() -> None:
    assert namespace_digest({"a": 1, "b": {"c": 2, "d": 3}}) == namespace_digest(
        {"b": {"d": 3, "c": 2}, "a": 1}
    )
    assert namespace_digest({"a": 1}) != namespace_digest({"a": "1"})
    assert canonical_json({"é": 1.5}) == '{"\\u00e9":1.5}'
    with pytest.raises(ValueError):
        canonical_json({"a": float("nan")})


tensors = st.builds(
    lambda dtype, shape: (dtype, tuple(shape)),
    st.sampled_from(sorted(DTYPE_BYTES)),
    st.lists(st.integers(1, 2**20), min_size=1, max_size=5),
)


@given(
    key=st.binary(min_size=7, max_size=68),
    specs=st.lists(tensors, min_size=1, max_size=80),
    tokens=st.integers(1, 2**20),
)
def test_headers_say_what_they_were_given(
    key: bytes, specs: list[tuple[str, tuple[int, ...]]], tokens: int
) -> None:
    names = ["kv", *(f"kv{n}" for n in range(1, len(specs)))]
    layout = PageLayout(
        tuple(TensorSpec(name, *spec) for name, spec in zip(names, specs, strict=True)), tokens
    )
    raw = encode_header(key, "0123456789ab", layout, page_checksum(key))
    assert len(raw) % 4096 == 0 and len(raw) <= MAX_HEADER_BYTES
    assert int.from_bytes(raw[:8], "little") == len(raw) - 8
    assert raw[46:78].decode() == page_checksum(key).partition(":")[2]  # as the document says
    parsed = parse_header(raw)
    assert (parsed.key, parsed.namespace) == (key, "0123456789ab")
    assert (parsed.layout, parsed.checksum) == (layout, page_checksum(key))
    assert parsed.encode() == raw


def test_the_header_in_the_document(
    open_tier: Callable[..., FsTier], paths: NamespacePaths
) -> None:
    (shown,) = re.findall(r"```text\n(\{\"__metadata__\".*?)\n```", DOCUMENT, re.S)
    key = make_key(1)
    store(open_tier(), {key: make_data(1, CONTEXT.layouts[0].nbytes)})
    raw = Path(paths.page(key)).read_bytes()
    values = {
        "<32 hex digits>": page_checksum(raw[4096:])[9:],
        "<group>": "0",
        "<offload key in hex>": key.hex(),
        "<digest>": paths.name[-12:],
        "<N>": "16",
        "[H,L,N,C]": "[4,3,16,7]",
        "<end>": str(CONTEXT.layouts[0].nbytes),
    }
    for word, value in values.items():
        assert word in shown
        shown = shown.replace(word, value)
    assert raw[8:4096].decode().rstrip(" ") == shown.replace("\n", "")


def test_the_reader_in_the_document(
    open_tier: Callable[..., FsTier], paths: NamespacePaths
) -> None:
    (program,) = re.findall(r"```python\n(import .*?)```", DOCUMENT, re.S)
    key = make_key(1)
    store(open_tier(), {key: make_data(1, CONTEXT.layouts[0].nbytes)})
    path = Path(paths.page(key))

    def run() -> list[str]:
        arguments = [sys.executable, "-c", program, str(path)]
        return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.split(
            "\n"
        )

    assert run() == [
        "kv F16 [4, 3, 16, 7]",
        f"hash {key[:-4].hex()} group 0 16 tokens",
        "checksum ok",
        "",
    ]
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert run()[-2] == "checksum WRONG"


def test_the_causes_in_the_document() -> None:
    """Every cause that the tier counts is explained."""
    source = ""
    tiers = Path(__file__).parents[3] / "tiers"
    for path in ("page/form.py", "fs/medium.py", "fs/files/failures.py", "fs/tier.py"):
        source += (tiers / path).read_text()
    pattern = r'BadPage\(\s*"([a-z-]+)"|errno\.\w+: "([a-z-]+)"|Outcome\("([a-z-]+)"\)'
    causes = {word for match in re.findall(pattern, source) for word in match if word}
    assert len(causes) > 10
    table = DOCUMENT.partition("## When a page is refused")[2]
    assert {cause for cause in causes if f"`{cause}`" not in table} == set()
