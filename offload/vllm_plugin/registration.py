"""Registration of the KV caches: all ranks agree, or all refuse with every rank's reason.

Workers register before the scheduler exists. Rank 0 creates the page region and leaves in
its header what the scheduler must know; see `kvstrata.offload.primary.region`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed.parallel_state import get_world_group
from vllm.v1.kv_offload.base import CanonicalKVCaches
from vllm.v1.kv_offload.config import OffloadingConfig

from kvstrata.kernels.geometry import LayerShape
from kvstrata.kernels.gpu.transport import Transport
from kvstrata.kernels.opening import open_pipeline
from kvstrata.kernels.pipeline import Pipeline
from kvstrata.kernels.plan import plan
from kvstrata.kernels.selftest import check_round_trip
from kvstrata.offload.config.offload_config import OffloadConfig
from kvstrata.offload.primary.region import (
    ALIGNMENT,
    HEADER_TEXT_BYTES,
    Region,
    RegionError,
    count_slots,
    create_region,
    open_region,
    round_up,
)
from kvstrata.offload.primary.reserver import Reserver
from kvstrata.offload.vllm_plugin.caches.drafts import draft_layers
from kvstrata.offload.vllm_plugin.caches.elements import elements_of
from kvstrata.offload.vllm_plugin.caches.layers import collect_layers
from kvstrata.offload.vllm_plugin.caches.page_layouts import layout_of, merge_layers
from kvstrata.offload.vllm_plugin.caches.windows import windows_of
from kvstrata.offload.vllm_plugin.engine.model_runner import overwrites_before_flush
from kvstrata.offload.vllm_plugin.engine.other_connectors import check_other_connectors
from kvstrata.offload.vllm_plugin.engine.shutdown_timeout import warn_of_sudden_stops
from kvstrata.offload.vllm_plugin.namespace.namespace import check_secondary_tiers, namespace_fields
from kvstrata.offload.vllm_plugin.weights.content import attempt
from kvstrata.offload.vllm_plugin.weights.fingerprint import WeightNames, name_weights
from kvstrata.offload.vllm_plugin.weights.updates import check_weights_fixed, weights_fixed
from kvstrata.offload.vllm_plugin.worker import KVStrataWorker
from kvstrata.tiers.base import layouts_to_json
from kvstrata.tiers.options import format_bytes
from kvstrata.tiers.registry import tier_class

logger = logging.getLogger("kvstrata")

T = TypeVar("T")


class RegistrationError(RuntimeError):
    """The KV caches cannot be offloaded."""


class Ranks:
    """The workers of this engine.

    vLLM's world group spans all data-parallel replicas of a node; each replica is an
    engine of its own, told apart by its engine id.
    """

    def __init__(self, engine_id: str) -> None:
        self._engine_id = engine_id
        group = get_world_group()
        self._group = group.cpu_group
        self._size = group.world_size

    def gather(self, value: T) -> list[T]:
        """The value of every rank of this engine, in the order of ranks."""
        values: list[Any] = [None] * self._size
        dist.all_gather_object(values, (self._engine_id, value), group=self._group)
        return [value for engine_id, value in values if engine_id == self._engine_id]

    def agree(self, action: Callable[[], T]) -> T:
        """Do the same on every rank.

        Raises:
            RegistrationError: on all ranks, if it failed on any of them.
        """
        done = attempt(action)
        errors = enumerate(self.gather(done.error))
        reasons = "; ".join(f"worker {rank}: {error}" for rank, error in errors if error)
        if reasons:
            raise RegistrationError(f"kvstrata cannot offload this KV cache: {reasons}")
        return cast(T, done.value)


def open_worker(
    config: OffloadingConfig, settings: OffloadConfig, caches: CanonicalKVCaches
) -> KVStrataWorker:
    """Register this worker's KV caches.

    Raises:
        RegistrationError: some rank cannot take part.
        ConnectorError: another connector writes to the KV cache.
    """
    vllm_config = get_current_vllm_config()
    if vllm_config.parallel_config.nnodes_within_dp > 1:
        raise RegistrationError("kvstrata does not support replicas that span several nodes")
    assert vllm_config.kv_transfer_config is not None
    check_other_connectors(vllm_config.kv_transfer_config)
    ranks = Ranks(config.engine_id)
    rank = config.parallel.rank
    mine = ranks.agree(lambda: collect_layers(config, vllm_config, caches))
    parts = ranks.gather(
        {
            group: [(layer.shape, layer.content_order, layer.local.cache.dtype) for layer in layers]
            for group, layers in mine.items()
        }
    )
    shapes = ranks.agree(
        lambda: {
            group: merge_layers([[shape for shape, *_ in part[group]] for part in parts])
            for group in mine
        }
    )

    weights = None
    if settings.tiers:
        if rank == 0:
            warn_of_sudden_stops(vllm_config)
        # said once, and before the weights are read, which may take a minute
        ranks.agree(
            lambda: check_weights_fixed(settings.weights_fixed, vllm_config) if rank == 0 else None
        )
        weights = name_weights(vllm_config, ranks.gather, rank)

    def create() -> Region | None:
        if rank != 0:
            return None
        return _create_region(config, settings, vllm_config, parts, shapes, weights)

    def register() -> Pipeline:
        groups = {
            group: plan(
                shapes[group],
                {layer.shape.name: layer.local for layer in layers},
                config.cache.blocks_per_chunk,
            )
            for group, layers in mine.items()
        }
        for segments in groups.values():
            check_round_trip(segments)
        transport = None if settings.transport == "auto" else Transport(settings.transport)
        ready = region.progress.first_slots
        return open_pipeline(groups, torch.from_numpy(region.pages), transport, scratch, ready)

    created = ranks.agree(create)
    region = ranks.agree(lambda: created or open_region(config.engine_id))
    reserver = Reserver(region, rank)
    try:
        scratch = ranks.agree(reserver.reserve_first)
        pipeline = ranks.agree(register)
    except RegistrationError:
        region.unlink()  # its memory goes with the processes
        raise
    reserver.start(pipeline.pin)
    logger.info("kvstrata: %s", pipeline.describe())
    return KVStrataWorker(
        pipeline,
        region,
        reserver,
        rank,
        [group.group_id for group in config.groups],
        config.cache.blocks_per_chunk,
        overwrites_before_flush=overwrites_before_flush(vllm_config),
    )


def _create_region(
    config: OffloadingConfig,
    settings: OffloadConfig,
    vllm_config: VllmConfig,
    parts: Sequence[Mapping[int, Sequence[tuple[LayerShape, str, str]]]],
    shapes: Mapping[int, Sequence[LayerShape]],
    weights: WeightNames | None,
) -> Region:
    """Rank 0: size the region from what all ranks hold, and write its header.

    `weights` is given where there are secondary tiers.
    """
    # Ranks may differ, for example in the scales of their heads: all of them count.
    found: dict[str, set[str]] = {}
    layers = [layer for part in parts for group in part.values() for layer in group]
    for shape, order, _ in layers:
        found.setdefault(shape.name, set()).add(order)
    content_orders = {name: "|".join(sorted(each)) for name, each in found.items()}
    dtypes = {shape.name: dtype for shape, _, dtype in layers}
    drafts = draft_layers(list(dtypes), vllm_config)
    blocks = config.cache.blocks_per_chunk
    layouts = {
        group.group_id: layout_of(shapes[group.group_id], blocks, group.tokens_per_block * blocks)
        for group in config.groups
    }
    tail = max([tier_class(tier.entry).tail_bytes for tier in settings.tiers], default=0)
    slot_bytes = round_up(max(layout.nbytes for layout in layouts.values()) + tail, ALIGNMENT)
    workers = config.parallel.world_size
    slots = count_slots(settings.cpu_bytes, slot_bytes, workers)
    if slots < workers:  # each tries its copies on one at start
        raise RegionError(
            f"cpu_bytes_to_use: {format_bytes(settings.cpu_bytes)} does not hold one page of "
            f"{format_bytes(slot_bytes)} ({blocks} blocks of each layer) for each of {workers} "
            f"workers: give at least {format_bytes(workers * slot_bytes + 2 * HEADER_TEXT_BYTES)}, "
            "and better a hundred times that, or make chunks smaller (blocks_per_chunk, block_size)"
        )
    fields: dict[str, Any] = {
        "slots": slots,
        "slot_bytes": slot_bytes,
        "workers": workers,
        "layouts": layouts_to_json(layouts),
        "model": config.model.name,
        "weights_fixed": weights_fixed(settings.weights_fixed, vllm_config),
        "elements": {group: elements_of(shapes[group], dtypes, blocks, drafts) for group in shapes},
        "windows": windows_of(config, vllm_config),
        "steps_ahead": vllm_config.max_concurrent_batches - 1,
        "lora": vllm_config.lora_config is not None,
        "namespace": None,
        "weights_watch": None,
    }
    if weights is not None:
        check_secondary_tiers(vllm_config)
        fields["namespace"] = namespace_fields(
            config, vllm_config, layouts, shapes, content_orders, weights.fields
        )
        fields["weights_watch"] = weights.watch
    return create_region(config.engine_id, fields)
