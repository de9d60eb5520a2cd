"""Which heads a rank may claim of a layer, and what is claimed of nothing."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from vllm.v1.kv_cache_interface import (  # noqa: E402
    AttentionSpec,
    FullAttentionSpec,
    KVQuantMode,
    MLAAttentionSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_offload.base import (  # noqa: E402
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
)

from kvstrata.kernels.geometry import (  # noqa: E402
    HEAD_SLABS,
    OPAQUE,
    TOKEN_MAJOR,
    GeometryError,
)
from kvstrata.offload.vllm_plugin.caches import layers as layers_module  # noqa: E402
from kvstrata.offload.vllm_plugin.caches.layers import (  # noqa: E402
    WorkerLayer,
    _heads_of,
    _is_plain,
    _Rank,
    _states,
)
from kvstrata.offload.vllm_plugin.engine.version import content_version  # noqa: E402
from tests.offload.vllm_plugin.modelless_engine import backend_class  # noqa: E402


def full(heads: int, head_size: int = 8) -> FullAttentionSpec:
    return FullAttentionSpec(
        block_size=16, num_kv_heads=heads, head_size=head_size, dtype=torch.float32
    )


def rank(
    tp: int, tp_rank: int, heads: int, *, uniform: bool = True, context_parallel: bool = False
) -> _Rank:
    return _Rank(tp, tp_rank, heads, uniform, context_parallel, ranks=tp, rank=tp_rank)


@pytest.mark.parametrize(
    ("tp", "model_heads", "local", "expected"),
    [
        (1, 4, 4, [(4, 0, 1, 0)]),
        (2, 4, 2, [(4, 0, 1, 0), (4, 2, 1, 0)]),
        # more ranks than heads: a head is held by several ranks, side by side
        (4, 2, 1, [(2, 0, 2, 0), (2, 0, 2, 1), (2, 1, 2, 0), (2, 1, 2, 1)]),
        (2, 1, 1, [(1, 0, 2, 0), (1, 0, 2, 1)]),
        # layers with more heads than the model says shard the same way
        (2, 4, 4, [(8, 0, 1, 0), (8, 4, 1, 0)]),
        # and so do layers with fewer, while a rank holds several
        (2, 8, 2, [(4, 0, 1, 0), (4, 2, 1, 0)]),
        (1, 4, 1, [(1, 0, 1, 0)]),
        # one head per rank, one rank per head
        (2, 2, 1, [(2, 0, 1, 0), (2, 1, 1, 0)]),
        # one head that cannot be one of the model's: it may be a copy, and nothing says of which
        (2, 4, 1, [None, None]),
        (3, 2, 1, [None, None, None]),
        (2, 0, 1, [None, None]),
    ],
)
def test_heads(
    tp: int, model_heads: int, local: int, expected: list[tuple[int, int, int, int] | None]
) -> None:
    found = [_heads_of(full(local), rank(tp, tp_rank, model_heads)) for tp_rank in range(tp)]
    assert found == expected


@pytest.mark.parametrize("model_heads", [1, 2, 4, 8])
def test_one_head_per_rank_is_nothing_known_where_layers_differ(model_heads: int) -> None:
    """A layer of 8 heads in a model of 4 has one head per rank at TP 8, and no copies."""
    claimed = [_heads_of(full(1), rank(8, n, model_heads, uniform=False)) for n in range(8)]
    assert claimed == [None] * 8
    assert _heads_of(full(2), rank(4, 1, model_heads, uniform=False)) == (8, 2, 1, 0)
    assert _heads_of(full(1), rank(1, 0, model_heads, uniform=False)) == (1, 0, 1, 0)


def test_latent_rows_are_one_head_on_all_ranks() -> None:
    spec = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    assert [_heads_of(spec, rank(2, n, 16)) for n in range(2)] == [(1, 0, 2, 0), (1, 0, 2, 1)]


def test_context_parallel_interleaves_tokens() -> None:
    assert _heads_of(full(4), rank(1, 0, 4, context_parallel=True)) is None


def test_plain_views() -> None:
    view = torch.zeros(10, 2, 16, 16)  # [B, H, N, K then V of 8]
    assert _is_plain(full(2), view, 10)
    assert _is_plain(full(2), view.view(20, 2, 8, 16), 10), "kernel blocks of half the size"
    window = SlidingWindowSpec(
        block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float32, sliding_window=64
    )
    assert _is_plain(window, view, 10)


@pytest.mark.parametrize(
    "shape",
    [(10, 2, 16, 8), (10, 4, 16, 16), (10, 2, 8, 16), (11, 2, 16, 16), (10, 16, 2, 16), (10, 512)],
    ids=str,
)
def test_other_views_are_not(shape: tuple[int, ...]) -> None:
    assert not _is_plain(full(2), torch.zeros(shape), 10)


@pytest.mark.parametrize("mode", KVQuantMode)
def test_of_the_quantised_only_those_with_one_scale_are(mode: KVQuantMode) -> None:
    """A mode that a later vLLM adds keeps what nobody here has read: vLLM 0.33's OCTAVE does."""
    spec = replace(full(2), kv_quant_mode=mode)
    plain = mode.name in ("NONE", "FP8_PER_TENSOR")
    assert _is_plain(spec, torch.zeros(10, 2, 16, 16), 10) is plain


def test_other_kinds_of_specs_are_not() -> None:
    class Other(FullAttentionSpec):
        """A kind of attention that we do not know."""

    spec = Other(block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float32)
    assert not _is_plain(spec, torch.zeros(10, 2, 16, 16), 10)


# -- layers as vLLM gives them ------------------------------------------------------

BLOCKS = 6
TOKENS = 16


class Module:
    """Stands for vLLM's attention layer with a cache of [B, H, N, K then V of 8]."""

    def __init__(
        self,
        heads: int,
        backend: str | type[Any] = "FLASH_ATTN",
        dtype: torch.dtype = torch.float32,
        kernels: int = 1,
        k_scale: Any = 1.0,
    ) -> None:
        self.spec: AttentionSpec = FullAttentionSpec(
            block_size=TOKENS, num_kv_heads=heads, head_size=8, dtype=dtype
        )
        self.kv_cache = torch.zeros(BLOCKS * kernels, heads, TOKENS // kernels, 16, dtype=dtype)
        self.backend = backend_class(backend) if isinstance(backend, str) else backend
        self._k_scale = torch.as_tensor(k_scale)
        self._v_scale = torch.tensor(1.0)

    def get_kv_cache_spec(self, _: Any) -> AttentionSpec:
        return self.spec

    def get_attn_backend(self) -> Any:
        return self.backend


def model_of(heads: int, **text: Any) -> Any:
    return SimpleNamespace(
        get_total_num_kv_heads=lambda: heads,
        hf_text_config=SimpleNamespace(to_dict=lambda: text),
    )


def collect(
    monkeypatch: pytest.MonkeyPatch,
    layers: dict[str, Module | None],
    *,
    model: Any = None,
    draft: Any = None,
    tp: int = 1,
    tp_rank: int = 0,
    packed: bool = False,
    hidden: int = 0,
) -> list[WorkerLayer]:
    """The layers of one group; None for a layer that vLLM has no module of."""
    modules = {name: module for name, module in layers.items() if module is not None}
    monkeypatch.setattr(layers_module, "get_layers_from_vllm_config", lambda *_: modules)
    raw = [
        module.kv_cache.view(torch.int8).reshape(BLOCKS, -1)
        if module is not None
        else torch.zeros(BLOCKS, 64, dtype=torch.int8)
        for module in layers.values()
    ]
    if packed:
        whole = torch.cat([*raw, torch.zeros(BLOCKS, hidden, dtype=torch.int8)], dim=1)
        width = whole.shape[1] - hidden
        raw = [whole.as_strided((BLOCKS, width), (width, 1))]
    config = SimpleNamespace(
        cache=SimpleNamespace(blocks_per_chunk=1),
        parallel=SimpleNamespace(tp_size=tp, pcp_size=1, dcp_size=1, rank=tp_rank),
        kv_cache_layout="LHBNC",
        groups=[
            SimpleNamespace(group_id=0, layer_names=tuple(layers), tokens_per_block=TOKENS),
        ],
    )
    engine = SimpleNamespace(
        model_config=model or model_of(2),
        cache_config=SimpleNamespace(cache_dtype="fp8"),
        speculative_config=draft and SimpleNamespace(draft_model_config=draft),
    )
    canonical = CanonicalKVCaches(
        [CanonicalKVCacheTensor(tensor, tensor.shape[1]) for tensor in raw],
        [[CanonicalKVCacheRef(index, tensor.shape[1]) for index, tensor in enumerate(raw)]],
    )
    return layers_module.collect_layers(config, engine, canonical)[0]  # type: ignore[arg-type]


@dataclass
class BlockConfig:
    """Some configurations keep objects of their own."""

    n_heads_in_group: int


@pytest.mark.parametrize(
    "text",
    [
        {},
        {"num_key_value_heads": 4, "num_attention_heads": 32},
        {"num_global_key_value_heads": None, "num_key_value_heads_per_layer": [4, 4]},
    ],
    ids=str,
)
def test_copies_are_claimed_where_all_layers_are_alike(
    text: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(4, **text)
    for tp_rank in range(8):
        layers = {"a": Module(1), "b": Module(1)}
        for layer in collect(monkeypatch, layers, model=model, tp=8, tp_rank=tp_rank):
            assert (layer.shape.content, layer.shape.heads) == (TOKEN_MAJOR, 4)
            local = layer.local
            assert (local.first_head, local.replicas, local.replica) == (
                tp_rank // 2,
                2,
                tp_rank % 2,
            )


@pytest.mark.parametrize("tp", [4, 8])
@pytest.mark.parametrize(
    "text",
    [
        {"num_key_value_heads": 4, "swa_num_key_value_heads": 8},
        {"num_key_value_heads": 4, "num_global_key_value_heads": 2},
        {"num_key_value_heads_per_layer": [4, 8]},
        {"num_key_value_heads": {"full": 4, "window": 8}},
        {"num_attention_groups": 4, "attention_other_setting": {"num_attention_groups": 8}},
        {"block_configs": [BlockConfig(n_heads_in_group=8)]},
    ],
    ids=str,
)
def test_nothing_is_claimed_of_one_head_where_layers_differ(
    text: dict[str, Any], tp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = {"full": Module(1), "window": Module(1)}
    found = collect(monkeypatch, layers, model=model_of(4, **text), tp=tp, tp_rank=1)
    assert [(layer.shape.content, layer.shape.heads) for layer in found] == [(OPAQUE, tp)] * 2
    assert [layer.local.replicas for layer in found] == [1, 1]


def test_layers_of_other_heads_on_this_rank_make_one_head_unclear(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = {"one": Module(1), "two": Module(2)}
    found = collect(monkeypatch, layers, model=model_of(4), tp=8)
    assert [layer.shape.content for layer in found] == [OPAQUE, TOKEN_MAJOR]
    assert found[1].shape.heads == 16


@pytest.mark.parametrize(
    ("draft", "content"),
    [
        (model_of(4), TOKEN_MAJOR),
        (model_of(8), OPAQUE),
        (model_of(4, swa_num_key_value_heads=8), OPAQUE),
    ],
)
def test_layers_of_the_draft_count(
    draft: Any, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = {"model": Module(1), "draft": Module(1)}
    found = collect(monkeypatch, layers, model=model_of(4), draft=draft, tp=8)
    assert [layer.shape.content for layer in found] == [content] * 2


# -- content order ----------------------------------------------------------------


def order_of(monkeypatch: pytest.MonkeyPatch, module: Module | None) -> str:
    [layer] = collect(monkeypatch, {"a": module})
    if module is None or module.backend.get_name() == "OTHER":
        assert layer.shape.content == OPAQUE
    return layer.content_order


def test_order_of_opaque_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of how a backend lays out its bytes separates pages."""
    plain = order_of(monkeypatch, Module(2, "OTHER"))
    assert plain == f"opaque/{content_version()}/OTHER/block16/kernel16/torch.float32"
    assert order_of(monkeypatch, Module(2, "OTHER")) == plain
    assert order_of(monkeypatch, None) == f"opaque/{content_version()}/unknown/block16/unknown"
    quarter = order_of(monkeypatch, Module(2, "OTHER", kernels=4))
    assert quarter == f"opaque/{content_version()}/OTHER/block16/kernel4/torch.float32"
    half = order_of(monkeypatch, Module(2, "OTHER", torch.float16))
    assert half == f"opaque/{content_version()}/OTHER/block16/kernel16/torch.float16"


def test_order_of_packed_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names every kind of layer that is packed together."""
    layers = {"a": Module(2, "X"), "b": Module(2, "X"), "c": Module(2, "Y"), "d": None}
    [layer] = collect(monkeypatch, layers, packed=True)
    assert layer.shape.content == OPAQUE
    assert layer.content_order == (
        f"opaque/{content_version()}/X/block16/kernel16/torch.float32,Y/block16/kernel16/torch.float32,"
        "unknown/block16/unknown"
    )


def test_a_packed_cache_that_hides_bytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In vLLM's head-outermost layouts the packed tensor ends after the first head."""
    with pytest.raises(GeometryError, match="LHBNC shows only a part of each block"):
        collect(monkeypatch, {"a": Module(2), "b": None}, packed=True, hidden=1000)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("backend", ["FLASH_ATTN", "CPU_ATTN", "OTHER"])
def test_order_of_fp8_content_has_its_scales(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers_module, "cpu_isa", lambda *_: "isa")

    def order(k_scale: Any) -> str:
        return order_of(monkeypatch, Module(2, backend, dtype, k_scale=k_scale))

    assert order(1.0) == order(1.0)
    assert len({order(1.0), order(0.5), order([1.0, 0.5]), order([0.5, 1.0])}) == 4


@pytest.mark.parametrize(
    ("backend", "content"), [("FLASH_ATTN", TOKEN_MAJOR), ("CPU_ATTN", HEAD_SLABS)]
)
def test_scales_mean_nothing_without_fp8(
    backend: str, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers_module, "cpu_isa", lambda *_: "isa")
    [one] = collect(monkeypatch, {"a": Module(2, backend)})
    [other] = collect(monkeypatch, {"a": Module(2, backend, k_scale=0.5)})
    assert one.shape.content == content and one.content_order == other.content_order


def test_states_of_layers_side_by_side() -> None:
    """Where a block holds all layers' pages, a layer's states lie a whole block apart."""
    memory = torch.arange(4 * 2 * 6, dtype=torch.float32).view(4, 2, 6)  # blocks, layers, states
    second = memory[:, 1, :2]  # the first state of two elements, of five in all
    found = _states(second, 4, 5 * 4)
    assert torch.equal(found, memory[:, 1, :5].contiguous().view(torch.uint8))
