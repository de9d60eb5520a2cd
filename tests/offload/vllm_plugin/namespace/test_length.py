"""`max_model_len` counts where a model may look at it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from kvstrata.offload.vllm_plugin.namespace import length  # noqa: E402
from kvstrata.offload.vllm_plugin.namespace.length import PLAIN_ROPE, depends_on_length  # noqa: E402
from kvstrata.offload.vllm_plugin.namespace.rule import deciding_fields  # noqa: E402
from tests.offload.vllm_plugin.namespace.configurations import checkpoint, engine  # noqa: E402


def model_of(architecture: str = "LlamaForCausalLM", **hf: Any) -> Any:
    return SimpleNamespace(architecture=architecture, hf_config=SimpleNamespace(to_dict=lambda: hf))


def rope(**settings: Any) -> Any:
    return model_of(rope_parameters=settings)


@pytest.mark.parametrize("kind", sorted(PLAIN_ROPE))
def test_plain_rope(kind: str) -> None:
    assert not depends_on_length(rope(rope_type=kind, factor=2.0))
    assert not depends_on_length(model_of(rope_scaling={"type": kind}))


@pytest.mark.parametrize("kind", ["longrope", "su", "dynamic", "a new one", None])
def test_rope_that_follows_the_length_or_may(kind: Any) -> None:
    assert depends_on_length(rope(rope_type=kind))
    assert depends_on_length(model_of(text_config={"rope_scaling": {"type": kind}}))
    by_layer = {
        "full_attention": {"rope_type": kind},
        "sliding_attention": {"rope_type": "default"},
    }
    assert depends_on_length(model_of(rope_parameters=by_layer))


def test_models_without_rope_and_with_rope_by_layer() -> None:
    assert not depends_on_length(model_of(alibi=True))
    assert not depends_on_length(model_of(rope_scaling=None, rope_parameters={"rope_theta": 1e4}))
    assert not depends_on_length(rope(rope_type="default", mrope_section=[1, 2]))
    layers = {"full_attention": {"rope_type": "proportional"}, "sliding_attention": {}}
    assert not depends_on_length(model_of(rope_parameters=layers))


def test_other_rotations_are_not_proven() -> None:
    assert depends_on_length(rope(rope_type="default", use_fope=True))
    assert depends_on_length(model_of(dual_chunk_attention_config={"chunk_size": 8}))


@pytest.mark.parametrize(
    "architecture",
    ["Llama4ForConditionalGeneration", "TransformersForCausalLM", "NobodysForCausalLM", None],
)
def test_models_that_read_it_or_whose_code_is_not_known(architecture: Any) -> None:
    assert depends_on_length(model_of(architecture))


def test_a_part_of_a_model_that_reads_it() -> None:
    assert depends_on_length(model_of(text_config={"model_type": "llama4_text"}))
    assert depends_on_length(model_of(text_config={"architectures": ["Llama4ForCausalLM"]}))


def test_models_of_others_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = SimpleNamespace(model_cls=length.depends_on_length)
    monkeypatch.setitem(length.ModelRegistry.models, "TheirsForCausalLM", registered)
    assert depends_on_length(model_of("TheirsForCausalLM"))


LONGROPE = {"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}


def test_longrope(tmp_path: Path) -> None:
    """vLLM chooses the factors by the length; with -1 by the longest, whatever fits in memory."""
    phi = checkpoint(
        tmp_path / "phi",
        architectures=["Phi3ForCausalLM"],
        model_type="phi3",
        original_max_position_embeddings=128,
        pad_token_id=0,
        rope_scaling=LONGROPE,
    )

    def length_of(max_model_len: int, fitting: int | None = None) -> Any:
        config = engine(phi, max_model_len=max_model_len)
        if fitting is not None:
            config.model_config.max_model_len = fitting
        return deciding_fields(config)["model_config"]["max_model_len"]

    assert [length_of(128), length_of(1024)] == [128, 1024]
    assert length_of(-1, fitting=128) == length_of(-1) == "auto"


def test_llama4_reads_the_generation_configuration_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fields(**override: Any) -> Any:
        model = model_of("Llama4ForCausalLM")
        model.model, model.revision = "no/such-model", None
        model.try_get_generation_config = lambda: {"temperature": 1.0}
        model.override_generation_config = override
        config = SimpleNamespace(model_config=model, load_config=SimpleNamespace(download_dir=None))
        return deciding_fields(config)  # type: ignore[arg-type]

    assert fields(temperature=0.5) == fields()
    assert fields(attn_temperature_tuning=True) != fields()
