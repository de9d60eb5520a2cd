"""What the bytes of pages mean, for audits: of which dtype they are, and which belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm.config import VllmConfig

from kvstrata.kernels.geometry import DTYPE_BYTES, HEAD_SLABS, OPAQUE, LayerShape, segment_shapes
from kvstrata.offload.audit.comparison import Elements


def elements_of(
    layers: Sequence[LayerShape],
    dtypes: Mapping[str, str],
    blocks_per_chunk: int,
    drafts: frozenset[str] = frozenset(),
) -> list[Elements]:
    """The tensors of a group's page, as `layout_of` has them.

    Args:
        layers: the group's layers in order.
        dtypes: safetensors dtype of each layer's numbers, also where its bytes are the backend's;
            "U8" where it is not known.
        blocks_per_chunk: blocks in a page.
        drafts: layers whose last token depends on the token behind the page.
    """
    shapes = {layer.name: layer for layer in layers}
    found = []
    for segment in segment_shapes(layers, blocks_per_chunk):
        shape = shapes[segment.layers[0]]
        kinds = {dtypes[name] for name in segment.layers}
        dtype = kinds.pop() if len(kinds) == 1 else "U8"
        per_row = blocks_per_chunk * (1 if shape.content in (HEAD_SLABS, OPAQUE) else shape.tokens)
        row_bytes = shape.width * DTYPE_BYTES[shape.dtype]
        # K and V have norms of their own; a latent row is cut in two as well, which does no harm.
        parts = 1 if shape.content == OPAQUE else 2
        if row_bytes % (parts * DTYPE_BYTES[dtype]):
            dtype, parts = "U8", 1
        names = list(enumerate(segment.layers))
        unstable = tuple(index for index, name in names if name in drafts)
        first = [i for i, name in names if _number(name, -1) == 0 and name not in drafts]
        sizes = segment.nbytes, dtype, row_bytes, per_row, len(segment.layers), parts
        found.append(Elements(*sizes, first[0] if first else -1, unstable))
    return found


def draft_layers(names: Sequence[str], vllm_config: VllmConfig) -> frozenset[str]:
    """The layers of an EAGLE or MTP draft: vLLM numbers them behind the model's own, or names them
    `mtp.layers.N`.

    Their input at a position is the token that follows it, so that the last position of a page
    is not decided by the page's key.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or not speculative.use_eagle():
        return frozenset()
    own = vllm_config.model_config.get_total_num_hidden_layers()
    return frozenset(n for n in names if _number(n, own) >= own or "mtp" in n.split("."))


def _number(name: str, otherwise: int) -> int:
    """The layer's number, which is the first one in its name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), otherwise)
