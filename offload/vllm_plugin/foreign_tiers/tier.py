"""ForeignTier: a tier that was made for vLLM's own manager, as a tier of ours.

vLLM's `p2p`, `obj`, `kvcr`, `fs` and `example`, and any other `SecondaryTierManager`. It moves the
slots of the page region as they are: what it calls chunks are our slots. Its methods are called on
the scheduler's thread, as they are there, except for those that may block.
"""

from __future__ import annotations

import inspect
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.v1.kv_offload.base import (
    LookupResult,
    OffloadingEvent,
    OffloadKey,
    OffloadPolicy,
    ReqContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.base import SecondaryTierManager

from kvstrata.offload.vllm_plugin.foreign_tiers.host import HostSpec
from kvstrata.offload.vllm_plugin.foreign_tiers.jobs import Jobs
from kvstrata.offload.vllm_plugin.foreign_tiers.parent import Parent
from kvstrata.offload.vllm_plugin.foreign_tiers.rows import Rows
from kvstrata.offload.vllm_plugin.foreign_tiers.seal import SEAL_BYTES, Seals
from kvstrata.tiers.base import (
    Job,
    JobResult,
    Lookup,
    PageKey,
    PrimaryPages,
    RequestView,
    SecondaryTier,
    TierConfigError,
    TierContext,
    TierStats,
)
from kvstrata.tiers.options import UnknownKeyError

logger = logging.getLogger("kvstrata.tiers")
T = TypeVar("T")

# What is given to a tier beside what the user says.
_EVENTS = "enable_kv_events"
_GIVEN = ("self", "offloading_spec", "primary_kv_view", "tier_type", "backpressure_detector")
_HIT, _MISS = LookupResult.HIT, LookupResult.MISS  # in Python 3.11 each is a call
_PAUSE_S = 0.001  # while a drain waits


class ForeignTier(SecondaryTier):
    """See the module's text. `classes.adapted` makes the subclass for each foreign class."""

    foreign: ClassVar[type[SecondaryTierManager]]
    type_name: ClassVar[str]
    tells_events: ClassVar[bool]  # itself, of what it stores and drops
    tail_bytes = SEAL_BYTES

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """See whether the class's constructor takes the options."""
        parameters = inspect.signature(cls.foreign.__init__).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        known = {each.name: each for each in parameters if each.kind in kinds}
        for given in (*_GIVEN, _EVENTS, "locality"):  # those of any tier
            known.pop(given, None)
        where = f"{cls.foreign.__name__} of {cls.foreign.__module__}"
        takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
        for key in options:
            if key not in known and not takes_any:
                raise UnknownKeyError(where, key, known)
        for name, each in known.items():
            if each.default is inspect.Parameter.empty and name not in options:
                raise TierConfigError(f"{name} is missing: give it, as {where} needs it")

    def __init__(self, options: Mapping[str, Any], context: TierContext) -> None:
        """Make the foreign tier.

        Raises:
            TierConfigError: it takes no such options, or its constructor raised.
        """
        self.check_options(options)
        region = context.region
        needed = SEAL_BYTES + max(layout.nbytes for layout in context.layouts.values())
        if region is None or region.slot_bytes < needed:
            raise TierConfigError(
                f"type {self.type_name!r} needs slots of {needed} bytes in shared memory"
            )
        rows = Rows(region)
        self._seals = Seals(context, rows)
        spec = HostSpec(context)
        if _EVENTS in inspect.signature(self.foreign.__init__).parameters:
            options = {**options, _EVENTS: spec.kv_events_config.enable_kv_cache_events}
        try:
            self._tier = self.foreign(
                offloading_spec=spec,
                primary_kv_view=rows.view,
                tier_type=self.type_name,
                backpressure_detector=None,
                **options,
            )
        except Exception as error:  # foreign code, which may raise anything
            raise TierConfigError(
                f"type {self.type_name!r}: {self.foreign.__name__} cannot be made: "
                f"{type(error).__name__}: {error}; correct its options or remove the entry"
            ) from error
        locality = self._tier.locality
        self.locality = locality.value if locality is not None else None
        self._jobs = Jobs(self.type_name, self._tier, self._seals, others_write=self.serves)
        self._requests: dict[str, ReqContext] = {}
        self._new: list[str] = []  # requests since the last step's end
        self._over: list[ReqContext] = []  # requests that ended with stores yet to be sent
        self._stopping: threading.Thread | None = None
        self._stopped = False

    def lookup(self, key: PageKey, request: RequestView) -> Lookup:
        """What the tier says; how long it may not know is for the manager to say."""
        counters = self._jobs.counters
        if self._stopping is not None or self._seals.nbytes(key) is None:
            counters["lookups"] += 1
            return Lookup.MISS
        found = self._tier.lookup(OffloadKey(key), self._context(request))
        if found is not _HIT and found is not _MISS:
            return Lookup.RETRY
        counters["lookups"] += 1
        if found is _MISS:
            return Lookup.MISS
        counters["hits"] += 1
        return Lookup.HIT

    def submit_store(self, job: Job) -> None:
        """The tier is given the pages once they are sealed."""
        if self._stopping is not None:
            self._jobs.refuse(job)
        else:
            self._jobs.store(job, self._context(job.request))

    def submit_load(self, job: Job) -> None:
        """The tier is given the job at once."""
        if self._stopping is not None:
            self._jobs.refuse(job)
        else:
            self._jobs.load(job, self._context(job.request))

    def get_finished(self) -> Sequence[JobResult]:
        """Results of the jobs that the tier has ended, what it loaded verified."""
        self._poll()
        return self._jobs.take_ended()

    def touch(self, keys: Collection[PageKey], request: RequestView) -> None:
        """Pass it on."""
        if self._stopping is None:
            self._tier.touch([OffloadKey(key) for key in keys], self._context(request))

    def on_new_request(self, request: RequestView) -> bool:
        """Pass it on, and what it answers."""
        if self._stopping is not None:
            return False
        return self._policy(self._begin(request)) is OffloadPolicy.REQUEST_LEVEL

    def on_request_finished(self, request: RequestView) -> None:
        """Pass it on, once the tier was given all stores of the request."""
        context = self._requests.pop(request.req_id, None)
        if context is not None and self._stopping is None:
            self._over.append(context)
            self._end_requests()

    def on_step_end(self) -> None:
        """Pass it on."""
        if self._stopping is None:
            self._poll()
            new, self._new = self._new, []
            self._tier.on_schedule_end(ScheduleEndContext(new, ()))

    def serve(self, pages: PrimaryPages) -> None:
        """Pass it on: peers ask, which may also write to the slots of the tier's loads."""
        if self._stopping is None:
            self._tier.serve_external_requests(Parent(pages, self._jobs))

    def wants_steps(self) -> bool:
        """What the tier says."""
        return self._stopping is None and self._tier.has_pending_work()

    def drain(self, timeout_s: float) -> bool:
        """Wait for the jobs; the tier's own way of waiting has no limit."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._poll()
            if not len(self._jobs):
                return True
            if time.monotonic() >= deadline:
                return False
            time.sleep(_PAUSE_S)

    def shutdown(self, timeout_s: float) -> bool:
        """Stop the tier, which may take it as long as it likes, in a thread."""
        if self._stopping is None:
            self._poll()
            self._stopping = threading.Thread(
                target=self._stop, name=f"kvstrata-stop-{self.type_name}", daemon=True
            )
            self._stopping.start()
        self._stopping.join(timeout_s)
        self._poll()
        return self._stopped

    def stats(self) -> TierStats:
        """Counted here: foreign tiers have metrics of their own, if any."""
        return TierStats(dict(self._jobs.counters), dict(self._jobs.failures))

    def take_events(self) -> Sequence[OffloadingEvent]:
        """The tier's own, since the last call."""
        if not self.tells_events or self._stopping is not None:
            return ()
        return self._told("take_events", lambda: list(self._tier.take_events()), [])

    def take_stats(self) -> OffloadingConnectorStats | None:
        """What the tier counted for its own metrics since the last call."""
        if self._stopping is not None:
            return None
        return self._told("get_stats", self._tier.get_stats, None)

    def config_info(self) -> Mapping[str, Any]:
        """vLLM 0.33: the tier's settings as labels."""
        read = getattr(self._tier, "config_info", dict)
        return self._told("config_info", lambda: dict(read()), {})

    def _told(self, what: str, ask: Callable[[], T], otherwise: T) -> T:
        """What the tier answers where no guard stands between."""
        try:
            return ask()
        except Exception:
            if not self._jobs.failures[f"raised-in-{what}"]:
                logger.exception("tier %s raised in %s", self.type_name, what)
            self._jobs.failures[f"raised-in-{what}"] += 1
            return otherwise

    def _poll(self) -> None:
        if self._stopping is None:
            self._jobs.poll()
            self._end_requests()
        elif self._stopped:
            self._jobs.close()

    def _stop(self) -> None:
        try:
            self._tier.shutdown()
        except Exception:  # it may go on to use the slots, which are left to it
            logger.exception("tier %s cannot be stopped", self.type_name)
        else:
            self._stopped = True

    def _end_requests(self) -> None:
        """Tell the tier of requests that ended, and of which it was given all stores."""
        waiting = self._over
        self._over = [each for each in waiting if self._jobs.sealing(each.req_id)]
        for context in waiting:
            if context not in self._over:
                self._tier.on_request_finished(context)

    def _context(self, request: RequestView) -> ReqContext:
        """vLLM's own object for the request, of which the tier was told."""
        context = self._requests.get(request.req_id)
        if context is None:  # nobody told of it: the manager's own
            context = self._begin(request)
            self._policy(context)
        return context

    def _begin(self, request: RequestView) -> ReqContext:
        context = request.engine
        if not isinstance(context, ReqContext):
            context = ReqContext(request.req_id, dict(request.params))
        self._requests[request.req_id] = context
        self._new.append(request.req_id)
        return context

    def _policy(self, context: ReqContext) -> OffloadPolicy:
        return self._tier.on_new_request(context).policy
