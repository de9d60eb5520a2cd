"""Canonical layers -> page layouts."""

from __future__ import annotations

from collections.abc import Sequence

from kvstrata.kernels.geometry import LayerShape, segment_shapes
from kvstrata.tiers.base import PageLayout, TensorSpec


def merge_layers(ranks: Sequence[Sequence[LayerShape]]) -> list[LayerShape]:
    """The layers of a group over all ranks, in the order of the pipeline stages.

    Raises:
        ValueError: two ranks describe one layer differently.
    """
    merged: dict[str, LayerShape] = {}
    for layers in ranks:
        for layer in layers:
            if merged.setdefault(layer.name, layer) != layer:
                raise ValueError(
                    f"layer {layer.name} differs between workers: {merged[layer.name]} and {layer}"
                )
    return list(merged.values())


def layout_of(layers: Sequence[LayerShape], blocks_per_chunk: int, tokens: int) -> PageLayout:
    """The page of a group: one tensor per segment, named kv, kv1, ...

    Args:
        layers: the group's layers in order.
        blocks_per_chunk: blocks in a page.
        tokens: tokens in a page.
    """
    return PageLayout(
        tuple(
            TensorSpec(f"kv{index or ''}", segment.dtype, tuple(segment.shape))
            for index, segment in enumerate(segment_shapes(layers, blocks_per_chunk))
        ),
        tokens,
    )
