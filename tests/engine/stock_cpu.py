"""vLLM's own TieringOffloadingSpec in its CPU build, which has no kernels for the worker's side.

All but the copies between the engine's blocks and the CPU tier's rows is vLLM's.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class CpuTieringSpec(TieringOffloadingSpec):
    """For models with one KV cache group, in chunks of one block."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """This worker's side, in its part of each row."""
        region = SharedOffloadRegion(
            engine_id=self.config.engine_id,
            num_chunks=self.num_chunks,
            rank=self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        return CopyWorker(kv_caches, region)


class CopyWorker(OffloadingWorker):
    """Copies at once."""

    def __init__(self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion) -> None:
        self._region = region
        # int8 [blocks, bytes] and [chunks, bytes] of each tensor
        self._pairs = [
            (
                each.tensor.view(torch.int8).view(-1, each.page_size_bytes),
                region.create_next_worker_view(each.page_size_bytes),
            )
            for each in kv_caches.tensors
        ]
        self._done: list[int] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: Any) -> bool:
        for blocks, rows in self._pairs:
            rows[dst_spec.block_ids] = blocks[src_spec.block_ids]
        self._done.append(job_id)
        return True

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: GPULoadStoreSpec) -> bool:
        for blocks, rows in self._pairs:
            blocks[dst_spec.block_ids] = rows[src_spec.block_ids]
        self._done.append(job_id)
        return True

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return [TransferResult(job_id=job_id, success=True) for job_id in done]

    def wait(self, job_ids: set[int]) -> None:
        pass

    def shutdown(self) -> None:
        self._pairs.clear()
        self._region.cleanup()
