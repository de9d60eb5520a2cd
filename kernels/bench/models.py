"""KV cache geometries of real models, for tests and benchmarks.

The numbers are those of the `config.json` on Hugging Face that each model names: layers are
`num_hidden_layers`, heads `num_key_value_heads`, the width twice `head_dim` (Llama's configs leave
it out: `hidden_size / num_attention_heads`), or `kv_lora_rank + qk_rope_head_dim` for MLA.
The blocks are vLLM's: 16 tokens, and 64 for MLA, as its FlashMLA backend asks.
"""

from dataclasses import dataclass

import torch

from kvstrata.kernels.geometry import DTYPE_NAMES, TOKEN_MAJOR, LayerShape, token_major
from kvstrata.kernels.plan import LocalLayer, Segment, plan

# vLLM's six, outermost axis first: layer, block, KV head, token in the block, content of a token
LAYOUTS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")


@dataclass(frozen=True)
class Group:
    """The layers of one KV cache group, which are all alike.

    heads: KV heads over all ranks; 1 for MLA, whose latent row every rank holds.
    width: elements of one token in one head: K then V, or the latent row.
    block_tokens: tokens per block.
    window: tokens that a sliding-window layer attends to; None for full attention.
    """

    layers: int
    heads: int
    width: int
    block_tokens: int = 16
    window: int | None = None
    dtype: torch.dtype = torch.bfloat16

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers and heads."""
        return self.layers * self.heads * self.width * self.dtype.itemsize


@dataclass(frozen=True)
class Model:
    """A model as it is usually served. config: the repository of its `config.json`."""

    name: str
    config: str
    tp: int
    groups: tuple[Group, ...]


MODELS = (
    Model("Llama-3-8B TP1", "meta-llama/Meta-Llama-3-8B", 1, (Group(32, 8, 2 * 128),)),
    Model("Llama-3-70B TP8", "meta-llama/Meta-Llama-3-70B", 8, (Group(80, 8, 2 * 128),)),
    Model("Qwen3-32B TP4", "Qwen/Qwen3-32B", 4, (Group(64, 8, 2 * 128),)),
    Model("DeepSeek-V3 MLA", "deepseek-ai/DeepSeek-V3", 1, (Group(61, 1, 512 + 64, 64),)),
    Model(
        "gpt-oss-20b",
        "openai/gpt-oss-20b",
        1,
        (Group(12, 8, 2 * 64, window=128), Group(12, 8, 2 * 64)),
    ),
)


def rank_caches(
    group: Group,
    layout: str,
    *,
    num_blocks: int,
    blocks_per_chunk: int,
    tp: int = 1,
    rank: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Segment, ...]:
    """The plan of one rank's caches, which are allocated for it with undefined content.

    layout: one of LAYOUTS. num_blocks: blocks of each layer's cache.
    The caches, `group.token_bytes / tp * block_tokens * num_blocks` bytes (without `/ tp` where
    one head is left), live as long as the plan.
    Raises ValueError for an unknown layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout} is none of {', '.join(LAYOUTS)}")
    sizes = {
        "L": group.layers,
        "B": num_blocks,
        "H": max(1, group.heads // tp),
        "N": group.block_tokens,
        "C": group.width,
    }
    memory = torch.empty([sizes[axis] for axis in layout], dtype=group.dtype, device=device)
    view = memory.permute([layout.index(axis) for axis in sizes])
    names = [f"layer.{i}" for i in range(group.layers)]
    replicas = max(1, tp // group.heads)
    local = {
        name: LocalLayer(
            token_major(name, view[i]), rank * group.heads // tp, replicas, rank % replicas
        )
        for i, name in enumerate(names)
    }
    dtype = DTYPE_NAMES[group.dtype]
    shapes = [
        LayerShape(name, TOKEN_MAJOR, dtype, group.heads, group.block_tokens, group.width)
        for name in names
    ]
    return plan(shapes, local, blocks_per_chunk)
