"""Of real configurations of vLLM: what decides differs, and nothing else does."""

import copy
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from transformers import LlavaConfig  # noqa: E402
from vllm.config import CacheConfig, ECTransferConfig, LoRAConfig  # noqa: E402
from vllm.config.multimodal import MultiModalConfig  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402

from kvstrata.offload.vllm_plugin.engine.errors import NamespaceError  # noqa: E402
from kvstrata.offload.vllm_plugin.namespace import device, rule  # noqa: E402
from kvstrata.offload.vllm_plugin.namespace.device import device_fields  # noqa: E402
from kvstrata.offload.vllm_plugin.namespace.rule import deciding_fields  # noqa: E402
from kvstrata.offload.vllm_plugin.namespace.table import TABLE  # noqa: E402
from kvstrata.tiers.page.identity import canonical_json  # noqa: E402
from tests.offload.vllm_plugin.namespace.configurations import checkpoint, engine  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def made(model: Path) -> Any:
    return engine(model)


@pytest.fixture
def config(made: Any) -> Any:
    """A configuration of its own for every test."""
    return copy.deepcopy(made)


def differing(one: Any, other: Any, path: str = "") -> set[str]:
    """Dotted paths of the leaves that differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = {*one, *other}
        return {
            found
            for key in keys
            for found in differing(one.get(key), other.get(key), f"{path}.{key}".lstrip("."))
        }
    return set() if one == other else {path}


def change(config: Any, path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        config = getattr(config, parent)
    setattr(config, name, value)


def test_plain_text_by_name(config: Any, model: Path) -> None:
    found = deciding_fields(config)
    assert json.loads(canonical_json(found)) == found
    assert found["model_config"]["hf_config"]["rope_parameters"]["rope_theta"] == 10_000.0
    assert found["model_config"]["dtype"] == "torch.float32"
    assert found["cache_config"]["cache_dtype"] == "auto"
    assert str(model.parent) not in canonical_json(found) and " at 0x" not in canonical_json(found)


def test_two_starts_agree(model: Path, made: Any, tmp_path: Path) -> None:
    """At another path, with other ports, sizes, ranks and seeds."""
    copied = shutil.copytree(model, tmp_path / "elsewhere" / "copy")
    other = engine(
        copied,
        max_model_len=2048,
        served_model_name="a name",
        tensor_parallel_size=2,
        seed=7,
        max_num_seqs=3,
        gpu_memory_utilization=0.5,
        enforce_eager=False,
        override_generation_config={"temperature": 0.3},
        hf_overrides=lambda hf_config: hf_config,
    )
    for path, value in {
        "parallel_config.data_parallel_master_port": 12345,
        "parallel_config.rank": 1,
        "cache_config.num_gpu_blocks": 999,
        "cache_config.block_size": 64,
        "instance_id": "another",
        "compilation_config.static_forward_context": {"layer": object()},
        "scheduler_config.max_num_batched_tokens": 77,
        "attention_config.backend": AttentionBackendEnum.FLASH_ATTN,
        "kernel_config.moe_backend": "triton",  # of weights that are not quantised
    }.items():
        change(other, path, value)
    assert deciding_fields(other) == deciding_fields(made)


CHANGES: dict[str, Any] = {
    "additional_config": {"x": 1},
    "model_config.model_impl": "vllm",
    "model_config.disable_sliding_window": True,
    "model_config.code_revision": "abc",
    "model_config.model_class_overrides": {"A": "b:C"},
    "cache_config.cache_dtype": "bfloat16",
    "cache_config.kv_cache_dtype_skip_layers": ["0"],
    "cache_config.mamba_ssm_cache_dtype": "float16",
    "cache_config.sliding_window": 128,
    "cache_config.use_replayssm": True,
    "cache_config.swa_bounded_replay": False,
    "load_config.load_format": "gguf",
    "load_config.model_loader_extra_config": {"qlora": True},
    "attention_config.indexer_kv_dtype": "fp8",
    "attention_config.disable_flashinfer_q_quantization": True,
    "attention_config.use_non_causal": True,
    "mamba_config.enable_stochastic_rounding": True,
}


@pytest.mark.parametrize("path", CHANGES)
def test_a_setting_that_decides_differs_by_its_own_name(path: str, config: Any) -> None:
    before = deciding_fields(config)
    change(config, path, CHANGES[path])
    found = differing(before, deciding_fields(config))
    assert found and all(name.startswith(path) for name in found)


def test_runners_count_as_vllm_resolved_them(model: Path, config: Any) -> None:
    before = deciding_fields(config)
    assert before["model_config"]["runner"] == "generate"
    assert deciding_fields(engine(model, runner="generate")) == before
    pooling = differing(before, deciding_fields(engine(model, runner="pooling")))
    assert pooling == {"model_config.runner", "model_config.convert"}


def test_overrides_count_by_their_effect(model: Path, config: Any) -> None:
    before = deciding_fields(config)
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    yarn = deciding_fields(engine(model, hf_overrides={"rope_parameters": rope}))
    more = rope | {"factor": 2.0}
    assert "model_config.hf_config.rope_parameters.factor" in differing(before, yarn)
    assert differing(
        yarn, deciding_fields(engine(model, hf_overrides={"rope_parameters": more}))
    ) == {"model_config.hf_config.rope_parameters.factor"}

    def override(hf_config: Any) -> Any:
        hf_config.rms_norm_eps = 0.5
        return hf_config

    found = deciding_fields(engine(model, hf_overrides=override))
    assert differing(before, found) == {"model_config.hf_config.rms_norm_eps"}


def test_what_a_checkpoint_says_beyond_its_class_counts(model: Path, config: Any) -> None:
    """Models read attributes that Transformers' class of the configuration does not declare."""
    before = deciding_fields(config)
    found = deciding_fields(engine(model, hf_overrides={"residual_scale": math.inf}))
    assert found["model_config"]["hf_config"]["residual_scale"] == "inf"
    assert differing(before, found) == {"model_config.hf_config.residual_scale"}


def test_where_a_configuration_came_from_does_not_count(config: Any) -> None:
    before = deciding_fields(config)
    hf_config = config.model_config.hf_config
    hf_config._name_or_path = "/x"
    hf_config.transformers_version = "9"
    hf_config.auto_map = {"AutoConfig": "repository--module.Config"}
    assert deciding_fields(config) == before


# -- images, video and audio ----------------------------------------------------------


def multimodal(config: Any, settings: Any = (), **hf: Any) -> Any:
    """The configuration as if the checkpoint were LLaVA's (whose code needs torchvision)."""
    config = copy.deepcopy(config)
    model = config.model_config
    text = model.hf_text_config.to_dict()
    model.hf_config = LlavaConfig(text_config=text, **hf)
    model.hf_text_config = model.hf_config.text_config
    model.multimodal_config = MultiModalConfig(**dict(settings))
    return config


@pytest.mark.parametrize(
    "settings",
    [
        {"mm_processor_kwargs": {"min_pixels": 1}},
        {"media_io_kwargs": {"video": {"num_frames": 4}}},
        {"video_pruning_rate": 0.5},
        {"video_pruning_method": "vidcom2"},
        {"mm_hasher_algorithm": "sha256"},
        {"mm_encoder_attn_dtype": "fp8"},
        {"language_model_only": True},
    ],
    ids=str,
)
def test_how_images_are_read_counts(settings: dict[str, Any], config: Any) -> None:
    found = differing(
        deciding_fields(multimodal(config)), deciding_fields(multimodal(config, settings))
    )
    [name] = settings
    [path] = found
    assert path.startswith(f"model_config.multimodal_config.{name}")


@pytest.mark.parametrize(
    "settings",
    [
        {"mm_processor_cache_gb": 9},
        {"mm_encoder_tp_mode": "data"},
        {"limit_per_prompt": {"image": 3}},
        {"skip_mm_profiling": True},
    ],
    ids=str,
)
def test_where_images_are_kept_does_not(settings: dict[str, Any], config: Any) -> None:
    before = deciding_fields(multimodal(config))
    assert deciding_fields(multimodal(config, settings)) == before


def test_the_vision_side_counts(config: Any) -> None:
    before = deciding_fields(multimodal(config))
    other = deciding_fields(multimodal(config, vision_feature_layer=-1))
    assert differing(before, other) == {"model_config.hf_config.vision_feature_layer"}
    deeper = multimodal(config)
    deeper.model_config.hf_config.vision_config.layer_norm_eps = 0.5
    assert differing(before, deciding_fields(deeper)) == {
        "model_config.hf_config.vision_config.layer_norm_eps"
    }


def test_a_file_that_a_setting_names_counts_by_its_content(config: Any, tmp_path: Path) -> None:
    def scales(name: str, text: str) -> Any:
        (tmp_path / name).write_text(text)
        settings = {
            "mm_encoder_attn_dtype": "fp8",
            "mm_encoder_fp8_scale_path": f"{tmp_path}/{name}",
        }
        return deciding_fields(multimodal(config, settings))

    assert scales("a", "1") == scales("b", "1") != scales("c", "2")
    gone = multimodal(config)
    gone.model_config.multimodal_config.mm_encoder_fp8_scale_path = str(tmp_path / "d")
    with pytest.raises(NamespaceError, match=r"mm_encoder_fp8_scale_path='.*d' cannot be read"):
        deciding_fields(gone)


def test_who_encodes_images_counts(config: Any) -> None:
    before = deciding_fields(config)
    config.ec_transfer_config = ECTransferConfig(
        ec_connector="ECExampleConnector", ec_role="ec_consumer", ec_port=1
    )
    with_role = deciding_fields(config)
    config.ec_transfer_config.ec_port = 2
    assert deciding_fields(config) == with_role != before


# -- quantisation, drafts, adapters ------------------------------------------------------


def test_quantisation_counts_with_what_multiplies(model: Path, config: Any) -> None:
    plain = deciding_fields(engine(model, dtype="bfloat16"))
    quantised = engine(model, dtype="bfloat16", quantization="fp8_per_tensor")
    before = deciding_fields(quantised)
    assert "model_config.quantization" in differing(plain, before)
    weight = before["model_config"]["quantization_config"]["linear"]["weight"]
    assert weight["dtype"] == "torch.float8_e4m3fn"
    quantised.kernel_config.moe_backend = "marlin"
    assert differing(before, deciding_fields(quantised)) == {"kernel_config.moe_backend"}
    quantised.kernel_config.enable_jit_warmup = False
    assert differing(before, deciding_fields(quantised)) == {"kernel_config.moe_backend"}


def test_the_attention_backend_counts_where_the_cache_is_quantised(config: Any) -> None:
    """FLASH_ATTN quantises queries beside an fp8 cache, others do not."""
    for dtype, counts in {"auto": False, "bfloat16": False, "fp8": True}.items():
        config.cache_config.cache_dtype = dtype
        config.attention_config.backend = None
        before = deciding_fields(config)
        config.attention_config.backend = AttentionBackendEnum.FLASH_ATTN
        found = differing(before, deciding_fields(config))
        assert found == ({"attention_config.backend"} if counts else set())


def test_the_draft_counts_and_how_much_is_drafted_does_not(model: Path, tmp_path: Path) -> None:
    def drafting(eps: float, tokens: int) -> Any:
        folder = tmp_path / f"{eps}-{tokens}"
        checkpoint(folder, num_hidden_layers=1, rms_norm_eps=eps)
        settings = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": tokens}
        return deciding_fields(engine(model, speculative_config=settings))

    assert drafting(1e-5, 3) == drafting(1e-5, 5)
    assert differing(drafting(1e-5, 2), drafting(1e-3, 2)) == {
        "speculative_config.draft_model_config.hf_config.rms_norm_eps"
    }


def test_how_adapters_are_read_counts(config: Any) -> None:
    config.lora_config = LoRAConfig(max_lora_rank=8, lora_dtype="float16")
    before = deciding_fields(config)
    config.lora_config.max_lora_rank = 16
    assert deciding_fields(config) == before
    config.lora_config.lora_dtype = "bfloat16"
    assert differing(before, deciding_fields(config)) == {"lora_config.lora_dtype"}


def test_secrets_are_not_written_down(config: Any) -> None:
    before = deciding_fields(config)
    config.load_config.model_loader_extra_config = {"s3_secret_access_key": "hush"}
    assert deciding_fields(config) == before


# -- what the table does not know ------------------------------------------------------


def with_new_field(config: Any, value: Any) -> Any:
    """As the next vLLM may have it."""

    @dataclass
    class Next(CacheConfig):
        kv_rotation: Any = None

    cache = object.__new__(Next)
    vars(cache).update(vars(config.cache_config), kv_rotation=value)
    config = copy.copy(config)
    config.cache_config = cache
    return config


def test_an_unknown_field_counts(config: Any) -> None:
    one, other = (deciding_fields(with_new_field(config, value)) for value in (1.0, 2.0))
    assert differing(one, other) == {"cache_config.kv_rotation"}
    assert deciding_fields(with_new_field(config, 1.0)) == one
    nested = deciding_fields(with_new_field(config, LoRAConfig()))
    assert nested["cache_config"]["kv_rotation"]["max_lora_rank"] == 16


@pytest.mark.parametrize("value", [object(), lambda: 0, [1, {"a": object()}]])
def test_an_unknown_field_without_a_stable_text_is_refused(value: Any, config: Any) -> None:
    with pytest.raises(NamespaceError, match=r"cache_config\.kv_rotation.* no text that is the"):
        deciding_fields(with_new_field(config, value))


def test_left_out_fields_are_not_looked_at(config: Any) -> None:
    """Every one of them may hold what it likes."""
    before = deciding_fields(config)
    for name, kind in {"": "VllmConfig", **TABLE["VllmConfig"].inner}.items():
        part = config if name == "" else getattr(config, name, None)
        for field in TABLE[kind].left_out if part is not None else ():
            vars(part)[field] = object()
    vars(config.load_config)["download_dir"] = None  # where files are looked for
    vars(config.model_config)["model"] = "no/such-model"
    vars(config.model_config)["revision"] = None
    vars(config.model_config)["trust_remote_code"] = False
    assert deciding_fields(config) == before


def test_guesses_from_the_text_do_not_count(model: Path) -> None:
    settings = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4}
    assert deciding_fields(engine(model, speculative_config=settings)) == deciding_fields(
        engine(model)
    )


@pytest.mark.parametrize("trusted", [False, True])
def test_the_class_that_remote_code_names_counts_where_it_may_run(
    trusted: bool, tmp_path: Path
) -> None:
    found = []
    for name in "AB":
        auto = {"AutoModelForCausalLM": f"modeling_x.{name}"}
        folder = checkpoint(tmp_path / name, auto_map=auto)
        found.append(deciding_fields(engine(folder, trust_remote_code=trusted)))
    path = "model_config.hf_config.auto_map.AutoModelForCausalLM"
    assert differing(*found) == ({path} if trusted else set())
    assert ("transformers" in found[0]["model_config"]) is trusted


def test_the_source_of_a_model_that_is_not_vllms_own_counts(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(rule, "module_of", lambda model: "foreign_model")
    codes = []
    for text in ("a = 1", "a = 2"):
        (tmp_path / "foreign_model.py").write_text(text)
        codes.append(deciding_fields(config)["model_config"]["code"])
    assert codes[0] != codes[1]
    assert codes[0].startswith("foreign_model:LlamaForCausalLM:sha256:")


def test_the_device_counts_where_something_is_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_fields(quantised=False) is None
    here = device_fields(quantised=True)
    assert here is not None and here["platform"] == "cpu" and here["capability"]
    monkeypatch.setattr(device.current_platform, "is_fp8_fnuz", lambda: True, raising=False)
    assert device_fields(quantised=True) != here
