"""What the bytes of pages mean, for audits: of which dtype they are, and which belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvstrata.kernels.geometry import DTYPE_BYTES, HEAD_SLABS, OPAQUE, LayerShape, segment_shapes
from kvstrata.offload.audit.comparison import Elements
from kvstrata.offload.vllm_plugin.caches.drafts import layer_number


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
        first = [i for i, name in names if layer_number(name, -1) == 0 and name not in drafts]
        sizes = segment.nbytes, dtype, row_bytes, per_row, len(segment.layers), parts
        found.append(Elements(*sizes, first[0] if first else -1, unstable))
    return found
