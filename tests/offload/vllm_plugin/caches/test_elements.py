"""What the bytes of pages mean, told from the layers."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from kvstrata.kernels.geometry import (  # noqa: E402
    HEAD_SLABS,
    OPAQUE,
    TOKEN_MAJOR,
    LayerShape,
    segment_shapes,
)
from kvstrata.offload.audit.comparison import Elements  # noqa: E402
from kvstrata.offload.vllm_plugin.caches.drafts import draft_layers, drafting  # noqa: E402
from kvstrata.offload.vllm_plugin.caches.elements import elements_of  # noqa: E402


def names(*numbers: int) -> list[str]:
    return [f"model.layers.{number}.self_attn.attn" for number in numbers]


def test_token_major_rows_are_tokens() -> None:
    layers = [LayerShape(name, TOKEN_MAJOR, "BF16", 8, 16, 256) for name in names(0, 1, 2)]
    found = elements_of(layers, dict.fromkeys(names(0, 1, 2), "BF16"), 4)
    assert found == [Elements(8 * 3 * 64 * 512, "BF16", 512, 64, 3, 2, 0)]


def test_slabs_have_the_dtype_of_their_numbers() -> None:
    layers = [LayerShape(name, HEAD_SLABS, "U8", 4, 1, 8192) for name in names(0, 1)]
    found = elements_of(layers, dict.fromkeys(names(0, 1), "F32"), 2)
    assert found == [Elements(4 * 2 * 2 * 8192, "F32", 8192, 2, 2, 2, 0)]


def test_opaque_rows_are_blocks() -> None:
    layers = [LayerShape(name, OPAQUE, "U8", 2, 1, 1000) for name in names(3, 4)]
    found = elements_of(layers, dict.fromkeys(names(3, 4), "BF16"), 1)
    assert found == [Elements(2 * 2 * 1000, "BF16", 1000, 1, 2, 1, -1)]


@pytest.mark.parametrize("dtypes", [["F32", "BF16"], ["U8", "U8"]])
def test_what_is_mixed_or_unknown_is_bytes(dtypes: list[str]) -> None:
    layers = [LayerShape(name, OPAQUE, "U8", 1, 1, 1000) for name in names(0, 1)]
    (found,) = elements_of(layers, dict(zip(names(0, 1), dtypes, strict=True)), 1)
    assert found.dtype == "U8"


def test_a_row_that_is_no_whole_number_of_elements_is_bytes() -> None:
    (layer,) = [LayerShape(name, OPAQUE, "U8", 1, 1, 1002) for name in names(0)]
    (found,) = elements_of([layer], {layer.name: "F32"}, 1)
    assert (found.dtype, found.parts) == ("U8", 1)


def test_only_the_models_first_layer_is_held_to_the_narrow_bound() -> None:
    """The full-attention group of a hybrid model begins deep inside of it."""
    for numbers, first in (((5, 11), -1), ((0, 5), 0), ((5, 0), 1)):
        layers = [LayerShape(name, TOKEN_MAJOR, "BF16", 8, 16, 256) for name in names(*numbers)]
        (found,) = elements_of(layers, dict.fromkeys(names(*numbers), "BF16"), 1)
        assert found.first == first


def test_sizes_are_those_of_the_page() -> None:
    layers = [
        LayerShape("a.0", TOKEN_MAJOR, "F16", 4, 16, 64),
        LayerShape("b.1", TOKEN_MAJOR, "F16", 2, 16, 64),
    ]
    found = elements_of(layers, {"a.0": "F16", "b.1": "F16"}, 2)
    assert [e.nbytes for e in found] == [s.nbytes for s in segment_shapes(layers, 2)]
    assert [e.first for e in found] == [0, -1]


def config(method: str) -> Any:
    eagle = method in ("eagle", "eagle3", "mtp")
    return SimpleNamespace(
        speculative_config=SimpleNamespace(method=method, use_eagle=lambda: eagle),
        model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: 2),
    )


@pytest.mark.parametrize("draft", ["model.layers.2.self_attn.attn", "mtp.layers.0.self_attn.attn"])
def test_drafts_are_left_out(draft: str) -> None:
    every = [*names(0, 1), draft]
    assert draft_layers(every, config("mtp")) == {draft}
    assert draft_layers(every, config("draft_model")) == frozenset()
    assert draft_layers(every, SimpleNamespace(speculative_config=None)) == frozenset()
    layers = [LayerShape(name, TOKEN_MAJOR, "BF16", 8, 16, 256) for name in every]
    (found,) = elements_of(layers, dict.fromkeys(every, "BF16"), 1, frozenset({draft}))
    assert (found.first, found.unstable) == (0, (2,))


def test_guesses_from_the_text_have_no_model() -> None:
    assert drafting(config("ngram")) is None
    assert drafting(config("eagle")) is not None
