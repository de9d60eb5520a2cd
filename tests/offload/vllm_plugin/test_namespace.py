"""The namespace: equal exactly when pages may be shared."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from kvstrata.kernels.geometry import HEAD_SLABS, OPAQUE, TOKEN_MAJOR, LayerShape  # noqa: E402
from kvstrata.offload.vllm_plugin.namespace import (  # noqa: E402
    NamespaceError,
    check_secondary_tiers,
    namespace_fields,
    weights_fingerprint,
    weights_fixed,
)
from kvstrata.offload.vllm_plugin.pages import layout_of  # noqa: E402

MIB = 2**20


class TextConfig:
    """Stands for a Hugging Face configuration."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def to_dict(self) -> dict[str, Any]:
        return self.fields


def model_of(folder: Path, **more: Any) -> Any:
    text = TextConfig(rope_theta=10_000.0, hidden_size=8, _name_or_path=str(folder))
    fields = {
        "model": str(folder),
        "revision": None,
        "quantization": None,
        "dtype": "torch.float32",
        "seed": 0,
        "hf_text_config": text,
    }
    return SimpleNamespace(**{**fields, **more})


def engine_of(model: Any, **more: Any) -> Any:
    fields = {
        "model_config": model,
        "load_config": SimpleNamespace(load_format="auto", download_dir=None),
        "cache_config": SimpleNamespace(prefix_caching_hash_algo="sha256"),
        "speculative_config": None,
        "weight_transfer_config": None,
    }
    return SimpleNamespace(**{**fields, **more})


def fingerprint(
    folder: Path, load_format: str = "auto", download_dir: str | None = None, **more: Any
) -> str:
    model = model_of(folder, **more)
    load = SimpleNamespace(load_format=load_format, download_dir=download_dir)
    return weights_fingerprint(model, engine_of(model, load_config=load))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Two weight files, one of them of three MiB, and files that are no weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model-00001.safetensors").write_bytes(os.urandom(3 * MIB))
    (folder / "model-00002.safetensors").write_bytes(os.urandom(100))
    (folder / "config.json").write_text("{}")
    return folder


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_equal_on_every_host(weights: Path, tmp_path: Path) -> None:
    """Neither the directory nor times nor other files count."""
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(weights, copy)
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    (copy / "README.md").write_text("more")
    assert fingerprint(copy) == fingerprint(weights) == fingerprint(weights)


def test_equal_behind_links(weights: Path, tmp_path: Path) -> None:
    """Hugging Face's cache links snapshots to blobs."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in weights.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert fingerprint(snapshot) == fingerprint(weights)


CHANGES: dict[str, Callable[[Path], object]] = {
    "first byte": lambda folder: flip(folder / "model-00001.safetensors", 0),
    "end of the first MiB": lambda folder: flip(folder / "model-00001.safetensors", MIB - 1),
    "start of the last MiB": lambda folder: flip(folder / "model-00001.safetensors", 2 * MIB),
    "last byte": lambda folder: flip(folder / "model-00001.safetensors", 3 * MIB - 1),
    "small file": lambda folder: flip(folder / "model-00002.safetensors", 50),
    "name": lambda folder: (folder / "model-00002.safetensors").rename(folder / "b.safetensors"),
    "size": lambda folder: os.truncate(folder / "model-00001.safetensors", 3 * MIB + 1),
    "size, same ends": lambda folder: (folder / "model-00001.safetensors").write_bytes(
        (data := (folder / "model-00001.safetensors").read_bytes())[:MIB] + data[2 * MIB :]
    ),
    "one more": lambda folder: (folder / "x.safetensors").write_bytes(b""),
    "one less": lambda folder: (folder / "model-00002.safetensors").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_weights_have_another_fingerprint(change: str, weights: Path) -> None:
    before = fingerprint(weights)
    CHANGES[change](weights)
    assert fingerprint(weights) != before


@pytest.mark.parametrize(
    "more",
    [{"quantization": "fp8"}, {"dtype": "torch.bfloat16"}, {"load_format": "bitsandbytes"}],
    ids=str,
)
def test_how_weights_are_read_counts(more: dict[str, Any], weights: Path) -> None:
    assert fingerprint(weights, **more) != fingerprint(weights)


def test_seed_of_real_weights_does_not_count(weights: Path) -> None:
    assert fingerprint(weights, seed=1) == fingerprint(weights)


def test_a_single_file_model(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    before = fingerprint(file)
    assert fingerprint(file) == before
    flip(file, 3)
    assert fingerprint(file) != before


def test_safetensors_go_before_other_formats(weights: Path) -> None:
    before = fingerprint(weights)
    (weights / "pytorch_model.bin").write_bytes(b"x")
    assert fingerprint(weights) == before


def test_unknown_weights_are_never_equal(weights: Path, tmp_path: Path) -> None:
    """Dummy weights, a directory without weights, a model that is nowhere on this host."""
    empty = tmp_path / "empty"
    empty.mkdir()
    for made in (
        lambda: fingerprint(weights, load_format="dummy"),
        lambda: fingerprint(empty),
        lambda: fingerprint(Path("no-such/model")),
    ):
        assert made() != made()


def test_a_restart_without_known_weights_is_warned_of(
    weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, with the reason; dummy weights are not meant to be found again."""
    caplog.set_level(logging.WARNING, "kvstrata")
    fingerprint(weights)
    fingerprint(weights, load_format="dummy")
    assert not caplog.records
    fingerprint(Path("no-such/model"), download_dir=str(tmp_path))
    [record] = caplog.records
    text = record.getMessage()
    assert "no-such/model" in text and f"{tmp_path} does not hold the model" in text
    assert "not be found after a restart" in text
    caplog.clear()
    empty = tmp_path / "empty"
    empty.mkdir()
    fingerprint(empty)
    assert f"{empty} has no *.safetensors, *.bin" in caplog.records[0].getMessage()


def test_downloads_are_found_where_vllm_puts_them(weights: Path, tmp_path: Path) -> None:
    """`download_dir` stands for Hugging Face's cache."""
    commit = "0123456789abcdef" * 2 + "01234567"
    repository = tmp_path / "downloads" / "models--some--model"
    shutil.copytree(weights, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    found = fingerprint(Path("some/model"), download_dir=str(tmp_path / "downloads"))
    assert found == fingerprint(weights)


# -- samples of weight files --------------------------------------------------------


@pytest.fixture
def tensors(tmp_path: Path) -> Path:
    """Embeddings at both ends of the file and three tensors between them."""
    file = tmp_path / "model.safetensors"
    kinds = {"a.embed": 2 * MIB, "b": 3 * MIB, "c": 9, "d": 5000, "z.head": 2 * MIB}
    save_file({name: np.zeros(size, np.uint8) for name, size in kinds.items()}, file)
    return file


def spans_of(file: Path) -> dict[str, tuple[int, int]]:
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    return {
        name: (start + entry["data_offsets"][0], start + entry["data_offsets"][1])
        for name, entry in header.items()
    }


@pytest.mark.parametrize("name", ["a.embed", "b", "c", "d", "z.head"])
def test_every_tensor_of_a_fine_tune_counts(name: str, tensors: Path) -> None:
    """A change in its middle 4 KiB is seen, though sizes and both ends stay."""
    before = fingerprint(tensors)
    begin, end = spans_of(tensors)[name]
    middle = (begin + end) // 2
    for offset in {middle, max(begin, middle - 2047), min(end - 1, middle + 2047)}:
        flip(tensors, offset)
        assert fingerprint(tensors) != before
        flip(tensors, offset)
    assert fingerprint(tensors) == before


def test_the_end_of_a_long_header_counts(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    names = [f"{'x' * 200}{index}" for index in range(6000)]
    save_file({name: np.zeros(500, np.uint8) for name in names}, file)
    before = fingerprint(file)
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert MIB < header < file.stat().st_size - MIB
    data = file.read_bytes()
    at = data.rindex(b"x" * 200)
    assert MIB < at < file.stat().st_size - MIB
    flip(file, at)
    assert fingerprint(file) != before


def raw_file(header: bytes, *, size: int | None = None) -> bytes:
    length = len(header) if size is None else size
    return length.to_bytes(8, "little") + header + bytes(4 * MIB)


BROKEN = {
    "no header": bytes(4 * MIB),
    "larger than the file": raw_file(b"{}", size=2**40),
    "2**64 - 1": raw_file(b"{}", size=2**64 - 1),
    "no JSON": raw_file(b"{nonsense"),
    "no text": raw_file(b"\xff\xfe"),
    "a list": raw_file(b"[1]"),
    "no object": raw_file(b'{"a": 1}'),
    "no offsets": raw_file(b'{"a": {}}'),
    "three offsets": raw_file(b'{"a": {"data_offsets": [0, 1, 2]}}'),
    "text": raw_file(b'{"a": {"data_offsets": ["0", "1"]}}'),
    "fractions": raw_file(b'{"a": {"data_offsets": [0.5, 1.5]}}'),
    "negative": raw_file(b'{"a": {"data_offsets": [-9, 1]}}'),
    "backwards": raw_file(b'{"a": {"data_offsets": [9, 1]}}'),
    "past the end": raw_file(b'{"a": {"data_offsets": [0, 9999999]}}'),
    "deep": raw_file(b"[" * 200_000),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_headers_fall_back(kind: str, tmp_path: Path) -> None:
    """Positions over the whole file stand in for the tensors."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(BROKEN[kind])
    before = fingerprint(file)
    assert fingerprint(file) == before
    flip(file, file.stat().st_size // 2 + 100)  # 4 MiB: every byte lies in a sample
    assert fingerprint(file) != before


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 3 * MIB, 4 * MIB])
def test_files_up_to_4_mib_are_read_whole(size: int, tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(bytes(size))
    before = fingerprint(file)
    for offset in {0, size // 3, size // 2, size - 1} if size else set():
        flip(file, offset)
        assert fingerprint(file) != before
        flip(file, offset)
    assert fingerprint(file) == before


def test_samples_of_large_files_are_spread_evenly(tmp_path: Path) -> None:
    size = 16 * MIB
    file = tmp_path / "model.bin"
    file.write_bytes(bytes(size))
    before = fingerprint(file)
    for index in (100, 511, 900):  # the first bytes of samples 100, 511 and 900 of 1024
        flip(file, (size - 4096) * index // 1023)
        assert fingerprint(file) != before
        flip(file, (size - 4096) * index // 1023)


# -- fields -----------------------------------------------------------------------


def fields(model: Any, *, content: Any = TOKEN_MAJOR, order: str = "", **more: Any) -> Any:
    dtype, tokens = ("BF16", 16) if content == TOKEN_MAJOR else ("U8", 1)
    shapes = {0: [LayerShape(name, content, dtype, 4, tokens, 64) for name in ("a", "b")]}
    config = SimpleNamespace(
        model=SimpleNamespace(dtype=more.get("kv_dtype", "bfloat16")),
        cache=SimpleNamespace(tokens_per_hash=16, blocks_per_chunk=2),
        groups=(SimpleNamespace(tokens_per_block=16, group_id=0),),
        parallel=SimpleNamespace(tp_size=more.get("tp", 1), pp_size=1, pcp_size=1, dcp_size=1),
        kv_cache_layout="LBHNC",
    )
    layouts = {0: layout_of(shapes[0], 2, 32)}
    orders = {"a": order, "b": order}
    engine = engine_of(model, **more.get("engine", {}))
    return namespace_fields(config, engine, layouts, shapes, orders)  # type: ignore[arg-type]


def test_fields_are_json_and_repeat(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    found = fields(model_of(weights))
    assert json.loads(json.dumps(found)) == found == fields(model_of(weights))
    assert found["pages"]["0"]["tokens"] == 32 and found["hash_seed"] == "vllm-default"
    assert found["draft_weights"] is None
    assert found["groups"]["0"]["layers"] == ["a", "b"]
    assert str(weights) not in json.dumps(found)


def test_kv_dtype_counts(weights: Path) -> None:
    model = model_of(weights)
    found = {kind: fields(model, kv_dtype=kind) for kind in ("bfloat16", "fp8", "fp8_e5m2")}
    for kind, got in found.items():
        assert got == found["bfloat16"] | {"kv_dtype": kind}


def test_topology_counts_for_opaque_pages_only(weights: Path) -> None:
    model = model_of(weights)
    assert fields(model, tp=2) == fields(model)
    opaque = fields(model, content=OPAQUE, order="opaque")
    assert opaque["topology"]["tp"] == 1
    assert fields(model, content=OPAQUE, order="opaque", tp=2) != opaque
    assert fields(model, content=HEAD_SLABS, order="isa", tp=2)["topology"] is None


def test_block_size_counts_for_content_of_the_backend_only(weights: Path) -> None:
    model = model_of(weights)
    assert fields(model)["tokens_per_block"] is None
    slabs = fields(model, content=HEAD_SLABS, order="amx")
    assert slabs["tokens_per_block"] == [16]
    assert slabs["groups"]["0"]["orders"] == ["amx"]


def test_model_configuration_counts_but_not_where_it_came_from(weights: Path) -> None:
    def digest(**text: Any) -> str:
        return fields(model_of(weights, hf_text_config=TextConfig(**text)))["text_config"]

    plain = digest(rope_theta=1.0)
    assert digest(rope_theta=1.0, _name_or_path="/x", transformers_version="5") == plain
    assert digest(rope_theta=2.0) != plain
    assert digest(rope_theta=1.0, rope_scaling={"factor": 2}) != plain


def test_hash_settings_count(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(weights)
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert fields(model)["hash_seed"] == "7"
    other = {"cache_config": SimpleNamespace(prefix_caching_hash_algo="sha256_cbor")}
    assert fields(model, engine=other)["hash_algorithm"] == "sha256_cbor"


def test_draft_model_counts(weights: Path, tmp_path: Path) -> None:
    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "d.safetensors").write_bytes(b"1")
    engine = {"speculative_config": SimpleNamespace(draft_model_config=model_of(draft))}
    model = model_of(weights)
    before = fields(model, engine=engine)
    assert before["draft_weights"] is not None
    flip(draft / "d.safetensors", 0)
    assert (
        fields(model, engine=engine)
        == before | {"draft_weights": fields(model, engine=engine)["draft_weights"]}
        != before
    )


# -- refusals ---------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["xxhash", "xxhash_cbor"])
def test_random_hashes_refuse_secondary_tiers(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = SimpleNamespace(prefix_caching_hash_algo=algorithm)
    engine = engine_of(model_of(tmp_path), cache_config=cache)
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(NamespaceError, match=rf"{algorithm}.*set PYTHONHASHSEED.*or use .*sha256"):
        check_secondary_tiers(engine)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    check_secondary_tiers(engine)


def test_cryptographic_hashes_need_no_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    check_secondary_tiers(engine_of(model_of(tmp_path)))


def test_weights_are_fixed_unless_the_engine_can_receive_new_ones(tmp_path: Path) -> None:
    plain = engine_of(model_of(tmp_path))
    transfer = engine_of(model_of(tmp_path), weight_transfer_config=object())
    assert weights_fixed(None, plain) and not weights_fixed(None, transfer)
    assert weights_fixed(True, transfer) and not weights_fixed(False, plain)
