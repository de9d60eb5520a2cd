"""Parent: our primary tier, as tiers for vLLM's own manager ask for its pages for peers."""

from __future__ import annotations

from collections.abc import Collection

from vllm.v1.kv_offload.base import (
    LookupResult,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
)
from vllm.v1.kv_offload.tiering.base import ParentManager, TransferJob

from kvstrata.offload.vllm_plugin.foreign_tiers.jobs import Jobs
from kvstrata.tiers.base import Lookup, PrimaryPages, RequestView

# Of pages that are lent in one step: sealing them takes the scheduler's thread some 10 ms.
MOST_LENT_BYTES = 128 * 2**20


class Parent(ParentManager):
    """Of use while `serve_external_requests` runs. Its requests are the tier's own."""

    def __init__(self, pages: PrimaryPages, jobs: Jobs) -> None:
        self._pages, self._jobs = pages, jobs
        self._left = MOST_LENT_BYTES

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """The request becomes known with its first look-up."""
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """HIT_PENDING of a page on its way, or of one more than can be sealed in this step."""
        nbytes = self._jobs.nbytes(key)
        if nbytes is None:
            return LookupResult.MISS
        if self._left <= 0:
            return LookupResult.HIT_PENDING
        found = self._pages.lookup(key, _view(req_context))
        if found is Lookup.HIT:
            self._left -= nbytes
            return LookupResult.HIT
        return LookupResult.MISS if found is Lookup.MISS else LookupResult.HIT_PENDING

    def create_store_job(
        self, keys: Collection[OffloadKey], req_context: ReqContext
    ) -> TransferJob:
        """The pages, which stay where they are until the tier ends the job."""
        return self._jobs.lend(self._pages.lend(list(keys), _view(req_context)), req_context)

    def on_request_finished(self, req_context: ReqContext) -> None:
        """The tier asks nothing more for the request."""
        self._pages.over(_view(req_context))


def _view(context: ReqContext) -> RequestView:
    return RequestView(context.req_id, context.kv_transfer_params or {}, engine=context)
