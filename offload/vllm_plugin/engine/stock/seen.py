"""What a tier of ours must know of an engine whose spec is vLLM's own.

With `KVStrataSpec` the workers find that out. With vLLM's nothing of ours runs in them, so all of
it is seen from the scheduler's process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.kv_offload.config import OffloadingConfig

from kvstrata.offload.config.stock_entry import StockEntry
from kvstrata.offload.secondary.opening import TierOpener, usable_entries
from kvstrata.offload.secondary.tier import TierLink
from kvstrata.offload.vllm_plugin.engine.errors import NamespaceError
from kvstrata.offload.vllm_plugin.engine.shutdown_timeout import warn_of_sudden_stops
from kvstrata.offload.vllm_plugin.engine.stock.mapped_file import open_file_behind
from kvstrata.offload.vllm_plugin.engine.stock.whole_config import whole_config
from kvstrata.offload.vllm_plugin.engine.version import check_version
from kvstrata.offload.vllm_plugin.namespace.namespace import check_secondary_tiers
from kvstrata.offload.vllm_plugin.namespace.rows import check_rows, row_fields, row_layouts
from kvstrata.offload.vllm_plugin.weights.fingerprint import name_weights
from kvstrata.offload.vllm_plugin.weights.updates import check_weights_fixed, weights_fixed
from kvstrata.offload.vllm_plugin.weights.watch import WeightWatch
from kvstrata.tiers.base import PageRegion, TierConfigError, TierContext


class SeenEngine:
    """The engine as one tier of ours sees it.

    Args:
        config: what vLLM tells its spec.
        rows: int8 [chunks, bytes of a row], vLLM's CPU tier.
        entry: the tier's.

    Attributes:
        layouts: of a row, by KV cache group.
    """

    def __init__(self, config: OffloadingConfig, rows: memoryview, entry: StockEntry) -> None:
        """Look at the engine.

        Raises:
            NamespaceError, RuntimeError: it cannot have tiers of ours.
            TierConfigError: its memory cannot be shared.
        """
        check_version()
        vllm_config, caches = whole_config(config.engine_id)
        _check_engine(vllm_config)
        check_rows(config, vllm_config, caches)
        try:
            check_weights_fixed(entry.weights_fixed, vllm_config)
        except NamespaceError as error:
            raise NamespaceError(f"{error} (as a key of the tier's entry)") from None
        warn_of_sudden_stops(vllm_config)
        assert rows.shape is not None and rows.strides is not None
        row_bytes = rows.strides[0]
        self.layouts = row_layouts(config, row_bytes)
        weights = name_weights(vllm_config, lambda value: [value], 0)
        fields = row_fields(config, vllm_config, self.layouts, weights.fields)
        self._fixed = weights_fixed(entry.weights_fixed, vllm_config)
        self._watch = WeightWatch(weights.watch) if weights.watch else None
        self._entries = usable_entries(entry, lora=vllm_config.lora_config is not None)
        try:
            fd, place = open_file_behind(rows)
        except OSError as error:
            raise TierConfigError(
                f"the memory of vLLM's CPU tier cannot be shared with I/O processes: {error}; use "
                "TieringOffloadingSpec of a supported vLLM, whose memory is a file in /dev/shm"
            ) from error
        self._region = PageRegion(fd, place, row_bytes, rows.shape[0])
        self._context = TierContext(config.model.name, fields, self.layouts, self._region)

    def open(self, deadline_s: float, clock: Callable[[], float]) -> Sequence[TierLink]:
        """The tier, or none where it is off; for the arguments see `TierLink`.

        Where weights may change, no other engine finds its pages, nor does a later opening.

        Raises:
            TierConfigError: it cannot be used.
        """
        return TierOpener(self._entries, self._context, private=not self._fixed)(deadline_s, clock)

    def same_weights(self) -> bool:
        """Whether they can be no others than those of the start; asked at a reset of the cache."""
        if self._watch is not None:
            self._fixed = self._fixed and not self._watch.changed()
        return self._fixed

    def close(self) -> None:
        """Let go of vLLM's memory. May be called twice."""
        if self._region.fd >= 0:
            os.close(self._region.fd)
            self._region = replace(self._region, fd=-1)


def _check_engine(vllm_config: VllmConfig) -> None:
    """Refuse what no tier of ours can serve.

    Raises:
        NamespaceError, RuntimeError: naming it.
    """
    if current_platform.is_xpu():
        raise RuntimeError("kvstrata does not support XPU: use CUDA, or vLLM's own tiers")
    parallel: Any = vllm_config.parallel_config
    if parallel.nnodes_within_dp > 1:
        raise RuntimeError("kvstrata does not support replicas that span several nodes")
    check_secondary_tiers(vllm_config)
