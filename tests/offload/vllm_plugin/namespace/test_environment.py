"""Environment variables: where they count, and how they are written."""

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

import vllm.envs  # noqa: E402

from kvstrata.offload.vllm_plugin.namespace.environment import (  # noqa: E402
    DECIDING,
    LEFT_OUT,
    environment,
)


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DECIDING:
        monkeypatch.delenv(name, raising=False)


def of_text() -> dict[str, object]:
    return environment(multimodal=False, quantised=False)


def test_defaults_count_where_they_matter() -> None:
    assert of_text() == {"VLLM_FLOAT32_MATMUL_PRECISION": "highest"}
    multimodal = environment(multimodal=True, quantised=False)
    assert multimodal["VLLM_VIDEO_LOADER_BACKEND"] == "opencv"
    assert environment(multimodal=False, quantised=True)["VLLM_USE_DEEP_GEMM_E8M0"] is True


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("VLLM_MLA_DISABLE", "1", True),
        ("VLLM_FLOAT32_MATMUL_PRECISION", "high", "high"),
        ("VLLM_VIDEO_LOADER_BACKEND", "opencv_dynamic", "opencv_dynamic"),
        ("VLLM_MARLIN_INPUT_DTYPE", "fp8", "fp8"),
        ("VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT", "1", True),
    ],
)
def test_what_is_set_counts(
    name: str, text: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = of_text()
    monkeypatch.setenv(name, text)
    assert of_text() == before | {name: value}


def test_what_is_set_to_its_default_is_as_if_it_were_not(monkeypatch: pytest.MonkeyPatch) -> None:
    before = of_text()
    monkeypatch.setenv("VLLM_MLA_DISABLE", "0")
    assert of_text() == before


def test_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    before = of_text()
    for name in LEFT_OUT:
        monkeypatch.setenv(name, "1")
    assert of_text() == before


def test_an_unknown_one_counts_and_tells_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    before = of_text()
    monkeypatch.setitem(vllm.envs.environment_variables, "VLLM_NEXT", lambda: 1)
    assert of_text() == before  # it is not set
    monkeypatch.setenv("VLLM_NEXT", "hush")
    one = of_text()
    assert one != before and "hush" not in str(one)
    monkeypatch.setenv("VLLM_NEXT", "other")
    assert of_text() != one
