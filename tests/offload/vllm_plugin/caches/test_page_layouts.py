"""Layers -> page layouts, and layouts through the region's header."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.kernels import geometry
from kvstrata.kernels.geometry import HEAD_SLABS, OPAQUE, TOKEN_MAJOR, LayerShape
from kvstrata.offload.vllm_plugin.caches.page_layouts import (
    layout_of,
    merge_layers,
)
from kvstrata.tiers.base import (
    DTYPE_BYTES,
    PageLayout,
    TensorSpec,
    layouts_from_json,
    layouts_to_json,
)


def test_tiers_and_kernels_know_the_same_elements() -> None:
    """They have a table each: neither imports the other."""
    assert {name: geometry.DTYPE_BYTES[name] for name in DTYPE_BYTES} == DTYPE_BYTES


def layer(name: str, heads: int = 4, width: int = 128, dtype: str = "BF16") -> LayerShape:
    return LayerShape(name, TOKEN_MAJOR, dtype, heads, 16, width)


def test_equal_layers_make_one_tensor() -> None:
    layout = layout_of([layer("a"), layer("b"), layer("c")], 2, 32)
    assert layout == PageLayout((TensorSpec("kv", "BF16", (4, 3, 32, 128)),), 32)
    assert layout.nbytes == 4 * 3 * 32 * 128 * 2


def test_unequal_layers_make_one_tensor_each_in_layer_order() -> None:
    layers = [layer("a"), layer("b", width=64), layer("c"), layer("d", dtype="F8_E4M3")]
    tensors = layout_of(layers, 1, 16).tensors
    assert [(t.name, t.dtype, t.shape) for t in tensors] == [
        ("kv", "BF16", (4, 2, 16, 128)),
        ("kv1", "BF16", (4, 1, 16, 64)),
        ("kv2", "F8_E4M3", (4, 1, 16, 128)),
    ]


def test_content_of_the_backend_is_bytes() -> None:
    slabs = LayerShape("a", HEAD_SLABS, "U8", 3, 1, 4096)
    rest = LayerShape("b", OPAQUE, "U8", 2, 1, 1000)
    assert [(t.dtype, t.shape) for t in layout_of([slabs, rest], 2, 64).tensors] == [
        ("U8", (3, 1, 2, 4096)),
        ("U8", (2, 2000)),
    ]


def test_pipeline_stages_follow_each_other_and_ranks_agree() -> None:
    first, second = [layer("0"), layer("1")], [layer("2")]
    assert merge_layers([first, first, second, second]) == [*first, *second]
    assert merge_layers([[], second]) == second


def test_ranks_that_disagree() -> None:
    with pytest.raises(ValueError, match="layer 1 differs between workers"):
        merge_layers([[layer("0"), layer("1")], [layer("0"), layer("1", width=64)]])


tensors = st.builds(
    TensorSpec,
    st.sampled_from(["kv", "kv1", "kv2"]),
    st.sampled_from(sorted(DTYPE_BYTES)),
    st.lists(st.integers(1, 2**20), min_size=1, max_size=4).map(tuple),
)
layouts = st.builds(
    PageLayout, st.lists(tensors, min_size=1, max_size=3).map(tuple), st.integers(1, 2**20)
)


@given(st.dictionaries(st.integers(0, 40), layouts, max_size=4))
def test_json_round_trip(sent: dict[int, PageLayout]) -> None:
    assert layouts_from_json(json.loads(json.dumps(layouts_to_json(sent)))) == sent
