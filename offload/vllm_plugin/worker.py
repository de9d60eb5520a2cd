"""The worker's side: vLLM's transfers handed to the pipeline."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from vllm.v1.kv_offload.base import (
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)

from kvstrata.kernels.pipeline import GroupWork, Pipeline
from kvstrata.offload.primary.region import Region
from kvstrata.offload.primary.reserver import Reserver
from kvstrata.offload.vllm_plugin.transfer import PageSlots, incomplete, work_of

logger = logging.getLogger("kvstrata")


class KVStrataWorker(OffloadingWorker):
    """Moves pages between this worker's KV cache and the shared region."""

    def __init__(
        self,
        pipeline: Pipeline,
        region: Region,
        reserver: Reserver,
        rank: int,
        group_ids: Sequence[int],
        blocks_per_chunk: int,
        *,
        overwrites_before_flush: bool,
    ) -> None:
        """overwrites_before_flush: see `model_runner.overwrites_before_flush`."""
        self._overwrites_before_flush = overwrites_before_flush
        self._pipeline = pipeline
        self._region = region
        self._reserver = reserver
        self._rank = rank
        self._group_ids = tuple(group_ids)
        self._blocks_per_chunk = blocks_per_chunk
        self._tickets: dict[int, int] = {}  # job id -> ticket, under way
        self._storing: dict[int, list[int]] = {}  # job id -> slots, of stores under way
        self._ended: set[int] = set()  # tickets above the watermark that have ended
        self._watermark = 0
        self._discarded = False  # said once

    def submit_store(
        self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec
    ) -> bool:
        """Start GPU -> region. Pages that miss a block are marked as incomplete."""
        assert isinstance(dst_spec, PageSlots)
        work = self._work(dst_spec, src_spec, store=True)
        for part in work:
            self._set_incomplete(incomplete(part))
        self._tickets[job_id] = dst_spec.ticket
        self._storing[job_id] = dst_spec.slots.tolist()
        self._pipeline.submit_store(job_id, work)
        return True

    def submit_load(
        self,
        job_id: int,
        src_spec: LoadStoreSpec,
        dst_spec: GPULoadStoreSpec,
        expedited: bool = False,
    ) -> bool:
        """Start region -> GPU. `expedited` (vLLM 0.33) does not queue behind others."""
        assert isinstance(src_spec, PageSlots)
        self._tickets[job_id] = src_spec.ticket
        work = self._work(src_spec, dst_spec, store=False)
        self._pipeline.submit_load(job_id, work, expedited=expedited)
        return True

    def get_finished(self) -> list[TransferResult]:
        """Transfers that ended since the last call; vLLM expects all of them to succeed."""
        results = []
        for done in self._pipeline.finished():
            self._ended.add(self._tickets.pop(done.job_id))
            self._storing.pop(done.job_id, None)
            results.append(TransferResult(done.job_id, True, done.nbytes, done.seconds))
        while self._watermark + 1 in self._ended:
            self._watermark += 1
            self._ended.remove(self._watermark)
        self._region.set_watermark(self._rank, self._watermark)
        return results

    def wait(self, job_ids: set[int]) -> None:
        """Let vLLM use the transfers' blocks for something else from now on.

        The engine need not stop for that: the device keeps the order. What vLLM has queued before
        this call is another matter: where that may overwrite the blocks, pages of stores that had
        not ended when the step began cannot be trusted, and are marked as incomplete.
        """
        late = job_ids & self._storing.keys() if self._overwrites_before_flush else ()
        for job_id in late:
            self._set_incomplete(self._storing[job_id])
        if late and not self._discarded:
            self._discarded = True
            logger.info(
                "kvstrata: vLLM may have overwritten blocks that were still to be stored; such "
                "pages are discarded and counted as incomplete_pages"
            )
        self._pipeline.fence(job_ids)

    def shutdown(self) -> None:
        """End all transfers and let go of the region."""
        self._reserver.stop()
        self._pipeline.shutdown()
        self._region.close()

    def _set_incomplete(self, slots: Iterable[int]) -> None:
        for slot in slots:
            self._region.set_incomplete(slot, True)

    def _work(self, pages: PageSlots, blocks: GPULoadStoreSpec, *, store: bool) -> list[GroupWork]:
        return work_of(pages, blocks, self._group_ids, self._blocks_per_chunk, store=store)
