"""The namespace: equal exactly when pages may be shared."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from kvstrata.kernels.geometry import HEAD_SLABS, OPAQUE, TOKEN_MAJOR, LayerShape  # noqa: E402
from kvstrata.offload.vllm_plugin.caches.page_layouts import layout_of  # noqa: E402
from kvstrata.offload.vllm_plugin.engine.errors import NamespaceError  # noqa: E402
from kvstrata.offload.vllm_plugin.namespace.namespace import (  # noqa: E402
    check_secondary_tiers,
    namespace_fields,
)
from kvstrata.offload.vllm_plugin.weights.fingerprint import name_weights  # noqa: E402
from tests.spoiling import flip  # noqa: E402

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


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Two weight files, one of them of three MiB, and files that are no weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model-00001.safetensors").write_bytes(os.urandom(3 * MIB))
    (folder / "model-00002.safetensors").write_bytes(os.urandom(100))
    (folder / "config.json").write_text("{}")
    return folder


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
    known = more.get("weights")
    if known is None:
        known = name_weights(engine, lambda value: [value], 0).fields  # type: ignore[arg-type]
    return namespace_fields(config, engine, layouts, shapes, orders, known)  # type: ignore[arg-type]


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
    def found(**text: Any) -> Any:
        model = model_of(weights, hf_text_config=TextConfig(**text))
        return fields(model)["configuration"]["model_config"]["hf_text_config"]

    plain = found(rope_theta=1.0)
    assert found(rope_theta=1.0, _name_or_path="/x", transformers_version="5") == plain
    assert found(rope_theta=2.0) == {"rope_theta": 2.0} != plain
    assert found(rope_theta=1.0, rope_scaling={"factor": 2}) != plain


def test_token_major_content_is_shared_by_versions(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(weights)
    before = fields(model)
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    assert fields(model) == before


def test_environment_counts(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(weights)
    monkeypatch.delenv("VLLM_MLA_DISABLE", raising=False)
    before = fields(model)
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    assert fields(model)["environment"] == before["environment"] | {"VLLM_MLA_DISABLE": True}


def test_a_namespace_that_does_not_fit_is_refused(weights: Path) -> None:
    """Long values are shortened; a great many of them are one clear error."""
    text = TextConfig(names=["layer"] * 1_000_000)
    assert len(json.dumps(fields(model_of(weights, hf_text_config=text)))) < 10_000
    endless = {f"setting_{i}": "x" * 1000 for i in range(2000)}
    with pytest.raises(NamespaceError, match=r"takes 2.* bytes.* in 'configuration', and config"):
        fields(model_of(weights, **endless))


def test_hash_settings_count(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(weights)
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert fields(model)["hash_seed"] == "7"
    other = {"cache_config": SimpleNamespace(prefix_caching_hash_algo="sha256_cbor")}
    assert fields(model, engine=other)["hash_algorithm"] == "sha256_cbor"


def test_weights_count(weights: Path) -> None:
    """Found out here, or by all ranks together before."""
    before = fields(model_of(weights))
    flip(weights / "model-00002.safetensors", 50)
    after = fields(model_of(weights))
    assert after == before | {"weights": after["weights"]} != before
    given = fields(model_of(weights), weights={"weights": "w", "draft_weights": "d"})
    assert given == before | {"weights": "w", "draft_weights": "d"}


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


def test_images_that_are_named_by_a_counter_refuse_secondary_tiers(tmp_path: Path) -> None:
    """vLLM hashes an image for its prefix cache or for the processor's cache only."""

    def check(cache_gb: float, caching: bool) -> None:
        model = model_of(
            tmp_path, multimodal_config=SimpleNamespace(mm_processor_cache_gb=cache_gb)
        )
        cache = SimpleNamespace(prefix_caching_hash_algo="sha256", enable_prefix_caching=caching)
        check_secondary_tiers(engine_of(model, cache_config=cache))

    with pytest.raises(NamespaceError, match=r"mm_processor_cache_gb=0.*leave out"):
        check(0, False)
    check(4, False)
    check(0, True)


def test_cryptographic_hashes_need_no_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    check_secondary_tiers(engine_of(model_of(tmp_path)))
