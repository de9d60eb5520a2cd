"""Tiers as others write them for vLLM's own manager; named by `module_path` in the tests."""

import threading
from collections.abc import Iterable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadingCounterMetadata,
    OffloadingEvent,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob


class DictTier(SecondaryTierManager):
    """Copies rows into a dict, at once."""

    medium = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        *,
        rows: dict[bytes, bytes] | None = None,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.rows = {} if rows is None else rows
        self.finished: list[JobResult] = []
        self.begun: list[str] = []
        self.over: list[str] = []

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        return LookupResult.HIT if bytes(key) in self.rows else LookupResult.MISS

    def submit_store(self, job: TransferJob) -> None:
        assert not job.is_promotion and job.req_context.req_id not in self.over
        for key, row in zip(job.keys, job.chunk_ids, strict=True):
            self.rows[bytes(key)] = bytes(self._row(row))
        self.finished.append(JobResult(job.job_id, True))

    def submit_load(self, job: TransferJob) -> None:
        assert job.is_promotion
        came = []
        for key, row in zip(job.keys, job.chunk_ids, strict=True):
            if (data := self.rows.get(bytes(key))) is not None:
                self._row(row)[:] = data
                came.append(key)
        whole = len(came) == len(job.keys)
        self.finished.append(JobResult(job.job_id, whole, None if whole else came))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        finished, self.finished = self.finished, []
        return finished

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        self.begun.append(req_context.req_id)
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        self.over.append(req_context.req_id)

    def drain_jobs(self) -> None:
        raise AssertionError("it may block, so nobody calls it")

    def _row(self, row: int) -> memoryview:
        view = self._primary_kv_view.cast("B")
        return view[row * self.block_size_bytes : (row + 1) * self.block_size_bytes]


class TellingTier(DictTier):
    """Tells what it does, and asks for steps."""

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:
        return {"telling_rows": OffloadingCounterMetadata("Rows.", ("kind",))}

    def take_events(self) -> Iterable[OffloadingEvent]:
        gone = [OffloadKey(key) for key in self.rows]
        self.rows.clear()
        if gone:
            yield OffloadingEvent(gone, Medium.STORAGE, True)

    def get_stats(self) -> OffloadingConnectorStats:
        stats = OffloadingConnectorStats()
        stats.increase_counter("telling_rows", len(self.rows), ("all",))
        return stats

    def has_pending_work(self) -> bool:
        return True


class RefusingTier(DictTier):
    def __init__(self, *_: Any, host: str, **__: Any) -> None:
        raise ValueError(f"nobody is at {host}")


class RaisingTier(DictTier):
    """Raises whatever it is given."""

    def submit_store(self, job: TransferJob) -> None:
        raise RuntimeError("no")

    submit_load = submit_store


class HangingTier(DictTier):
    """Ends nothing, knows nothing, and does not stop before it may."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.may_stop = threading.Event()
        self.jobs: list[TransferJob] = []

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        return LookupResult.RETRY

    def submit_store(self, job: TransferJob) -> None:
        self.jobs.append(job)

    submit_load = submit_store

    def shutdown(self) -> None:
        self.may_stop.wait()
