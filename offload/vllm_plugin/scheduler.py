"""The scheduler's side: vLLM's OffloadingManager in front of the TieringManager."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import cast

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import (
    OffloadingConnectorStats,
)
from vllm.v1.kv_offload.base import (
    LoadStoreSpec,
    Locality,
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadingManager,
    OffloadKey,
    OffloadPolicy,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
    TierFilter,
)
from vllm.v1.kv_offload.config import OffloadingConfig

from kvstrata.offload.audit.comparer import Comparer
from kvstrata.offload.audit.comparison import Elements
from kvstrata.offload.config.offload_config import OffloadConfig
from kvstrata.offload.finding.lookup import Answer
from kvstrata.offload.manager import TieringManager
from kvstrata.offload.metering.minute import MinuteLog, Told
from kvstrata.offload.primary.region import Region, open_region
from kvstrata.offload.primary.slots import Entry
from kvstrata.offload.secondary.opening import TierOpener, usable_entries
from kvstrata.offload.secondary.tier import TierLink
from kvstrata.offload.vllm_plugin.engine.offload_cap import below_cap, has_partial_tails, take_cap
from kvstrata.offload.vllm_plugin.engine.recorder import Recorder, open_recorder
from kvstrata.offload.vllm_plugin.foreign_tiers import told
from kvstrata.offload.vllm_plugin.metrics.config_info import Labels, config_info
from kvstrata.offload.vllm_plugin.metrics.info import info_labels
from kvstrata.offload.vllm_plugin.metrics.totals import Sizes, StatsReader
from kvstrata.offload.vllm_plugin.transfer import PageSlots
from kvstrata.offload.vllm_plugin.weights.watch import WeightWatch
from kvstrata.tiers.base import PageKey, RequestView, TierContext, layouts_from_json
from kvstrata.tiers.options import format_bytes
from kvstrata.tiers.page.identity import directory_name
from kvstrata.tiers.registry import TierEntry

logger = logging.getLogger("kvstrata")

# Bound once: in Python 3.11 reaching a member of an enumeration, or hashing one, is a call.
_HIT, _MISS, _PENDING = Answer.HIT, Answer.MISS, Answer.PENDING
_VLLM_HIT, _VLLM_MISS = LookupResult.HIT, LookupResult.MISS
_VLLM_PENDING, _VLLM_RETRY = LookupResult.HIT_PENDING, LookupResult.RETRY
# While requests are served, metrics are collected so often; with a filesystem tier they take as
# long as some hundred look-ups.
STATS_EVERY_S = 0.1
try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ImportError:  # vLLM 0.31 does not ask
    _SOURCES: dict[str, CacheHitSource] = {}
else:
    _SOURCES = {"CPU": CacheHitSource.HOST, "STORAGE": CacheHitSource.DISK}
_EVENT_FIELDS = {field.name for field in dataclasses.fields(OffloadingEvent)}
_FORGETS = "metadata_only" in _EVENT_FIELDS  # from vLLM 0.33 on


class KVStrataScheduler(OffloadingManager):
    """Translates between vLLM's calls and ours; holds no policy of its own."""

    def __init__(
        self,
        manager: TieringManager,
        region: Region,
        *,
        events: bool,
        info: Callable[[], Sequence[Labels]] = lambda: [{}],
        caps: bool = False,
        stats: StatsReader | None = None,
        log_interval_s: float = 0.0,
        recorder: Recorder | None = None,
    ) -> None:
        self._manager = manager
        self._caps = caps  # whether `max_offload_tokens` is kept here
        self._region = region
        self._events = events
        self._info = info
        self._stats = stats or StatsReader()
        self._recorder = recorder
        self._next_stats = 0.0
        self._minute = MinuteLog(log_interval_s, self._tell_log)
        # The request that was last told to wait in this step. vLLM goes on to ask for all of its
        # prefix, step by step, and a million tokens may be 65,536 chunks.
        self._waiting: ReqContext | None = None
        self._ticket = 0
        # (last ticket before a reset, entries that transfers up to it may still touch)
        self._held: list[tuple[int, list[Entry]]] = []

    # -- look-up and load ---------------------------------------------------------

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        if req_context is self._waiting and self._manager.comes(key):
            return _VLLM_PENDING
        end = req_context.get_offload_key_position(key) or 0
        view = req_context.get_state(RequestView) or self._view(req_context)
        answer = self._manager.lookup(key, end, view)
        if answer is _HIT:
            return _VLLM_HIT
        if answer is _MISS:
            # There is no public way to the end of a request's last page.
            positions = getattr(req_context, "_offload_key_positions", {})
            self._manager.missed(key, end, positions, view)
            return _VLLM_MISS
        if answer is _PENDING:
            self._waiting = req_context if self._manager.answers_alike else None
            return _VLLM_PENDING
        return _VLLM_RETRY

    def get_load_source(self, key: OffloadKey, req_context: ReqContext) -> CacheHitSource:
        name = self._manager.source(key, self._view(req_context))
        if name is None:
            return CacheHitSource.HOST
        link = next(link for link in self._manager.links if link.name == name)
        own: CacheHitSource | None = told.hit_source(link)
        return own or _SOURCES.get(link.medium or "", CacheHitSource.EXTERNAL_UNSPECIFIED)

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> LoadStoreSpec:
        ordered = list(keys)
        slots = self._manager.prepare_load(ordered, self._view(req_context))
        return self._transfer(ordered, slots)

    def complete_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        self._manager.complete_load(keys, self._view(req_context))

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        self._manager.touch(keys, self._view(req_context))

    # -- store --------------------------------------------------------------------

    def prepare_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext
    ) -> PrepareStoreOutput | None:
        self._release_held()
        if self._caps:
            keys = below_cap(keys, req_context)
        wanted = [(key, req_context.get_offload_key_position(key) or 0) for key in keys]
        chosen = self._manager.prepare_store(wanted, self._view(req_context))
        if chosen is None:
            return None
        for slot in chosen.slots:
            self._region.set_incomplete(slot, False)
        stored = cast(list[OffloadKey], chosen.keys)
        # vLLM makes a transfer only of a plan with keys: only those take a ticket.
        spec = self._transfer(stored, chosen.slots) if stored else PageSlots(0, (), ())
        return PrepareStoreOutput(stored, spec, cast(list[OffloadKey], chosen.evicted))

    def complete_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True
    ) -> None:
        assert success, "vLLM reports no failed transfers to an offloading manager"
        self._manager.complete_store(keys, self._view(req_context))

    # -- requests, steps, life cycle ----------------------------------------------

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        if self._caps:
            take_cap(req_context)
        if self._manager.on_new_request(self._view(req_context)):
            return RequestOffloadingContext(OffloadPolicy.REQUEST_LEVEL)
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        # With it the pages that vLLM had in GPU memory and asked nothing about. There is no public
        # way to all of a request's keys.
        pages = getattr(req_context, "_offload_key_positions", {})
        self._manager.on_request_finished(self._view(req_context), pages)
        if self._recorder is not None:
            self._recorder.ended(req_context, pages)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._release_held()
        self._waiting = None
        self._manager.on_step_end()
        if not self._events:
            self._manager.take_events()  # nobody may ask for them, and they must not pile up

    def has_pending_work(self) -> bool:
        untold = self._events and self._manager.changes.more
        return bool(self._held) or untold or self._manager.has_pending_work()

    def take_events(self) -> Iterable[OffloadingEvent]:
        """What came and went, and (vLLM 0.33) what vLLM may forget as it never came.

        vLLM remembers what it announced of a page until its last tier that says what it drops did.
        """
        for keys, removed, link, announced in self._manager.take_events():
            medium = "CPU" if link is None else link.medium
            if not (self._events and keys and medium):  # it may have no word for the medium
                continue
            if link is not None and (not link.kv_events or told.tells_events(link)):
                continue  # nobody wants to know, or it is told below
            more: dict[str, bool] = {}
            if not removed and (link is None or link.tier.tells_changes):
                more["removal_expected"] = True
            if not announced:
                if not _FORGETS:
                    continue
                more["metadata_only"] = True
            yield OffloadingEvent(
                keys=[OffloadKey(key) for key in keys],
                medium=Medium(medium),
                removed=removed,
                locality=_locality(link),
                ownership=None if link is None else link.name,
                **more,
            )
        if self._events:
            yield from told.events(self._manager.links)

    def reset_cache(self) -> None:
        self._waiting = None
        held = self._manager.reset()
        if self._events:  # vLLM tells that all was cleared
            self._manager.changes.begin_anew()
        if held:
            self._held.append((self._ticket, held))

    def on_reset_flushed(self) -> None:
        """vLLM 0.33: the workers have ended all that was in flight at the last reset."""
        for _, entries in self._held:
            for entry in entries:
                self._manager.primary.end_gpu(entry)
        self._held.clear()

    def get_stats(self) -> OffloadingConnectorStats | None:
        now = time.monotonic()
        if now < self._next_stats and self._manager.serving:
            return None  # vLLM asks in every step
        self._next_stats = now + STATS_EVERY_S
        stats = self._stats.read(self._manager)
        told.add_stats(self._manager.links, stats)
        return stats

    def _tell_log(self) -> Told:
        """What the line of the log is made of; on the log's thread."""
        manager = self._manager
        saved = manager.saved_net if manager.savings.seconds_per_token() else None
        return Told(manager.found.takings, saved, self._stats.held(manager))

    def config_info(self) -> Sequence[Labels]:
        """vLLM 0.33: the labels of `vllm:kv_offload_config_info`, asked for once."""
        by_name = {link.name: told.config_info(link) for link in self._manager.links}
        return [{**by_name.get(str(each.get("tier")), {}), **each} for each in self._info()]

    def shutdown(self) -> None:
        self._minute.close()
        self._manager.shutdown()
        if self._recorder is not None:
            self._recorder.close()
        self._region.close()

    # -- inside -------------------------------------------------------------------

    def _transfer(self, keys: Sequence[PageKey], slots: Sequence[int]) -> PageSlots:
        self._ticket += 1
        groups = np.frombuffer(b"".join([key[-4:] for key in keys]), ">i4")  # key_group of each
        return PageSlots(self._ticket, slots, groups)

    def _release_held(self) -> None:
        """Free the slots of transfers that a reset left behind, once no worker is in them."""
        while self._held and self._held[0][0] <= self._region.watermark():
            for entry in self._held.pop(0)[1]:
                self._manager.primary.end_gpu(entry)

    def _view(self, req_context: ReqContext) -> RequestView:
        view = req_context.get_state(RequestView)
        if view is None:
            view = RequestView(
                req_context.req_id,
                req_context.kv_transfer_params or {},
                self._allowed(req_context.load_tier_filter),
                req_context,
            )
            req_context.set_state(view)
        return view

    def _allowed(self, tier_filter: TierFilter) -> frozenset[str] | None:
        if tier_filter is TierFilter.ALL:
            return None
        return frozenset(
            link.name
            for link in self._manager.links
            if tier_filter.allows(Medium(link.medium) if link.medium else None, _locality(link))
        )


def _sizes(manager: TieringManager, region: Region) -> Sizes:
    """Of the primary tier, where every token needs a page of each group that is needed whole."""
    whole = {group: each for group, each in manager.layouts.items() if group not in manager.windows}
    slots = sum(1 / each.tokens for each in (whole or manager.layouts).values())
    return Sizes(region.slot_bytes, 1 / slots)


def _recorder(
    path: str | None, config: OffloadingConfig, manager: TieringManager, sizes: Sizes
) -> Recorder | None:
    if path is None:
        return None
    tokens = manager.found.chunk_tokens
    nbytes = round(sizes.slot_bytes * tokens / sizes.slot_tokens)
    return open_recorder(path, config, group=manager.found.group, tokens=tokens, nbytes=nbytes)


def _described(entry: TierEntry) -> str:
    """Name, places and limit of a tier; nothing else of its entry, which may be a password."""
    places = entry.directories
    limit = entry.entry.get("max_bytes")
    return (
        entry.name
        + (f" in {' and '.join(places)}" if places else "")
        + (f" of at most {limit}" if limit else "")
    )


def _locality(link: TierLink | None) -> Locality | None:
    if link is None:
        return Locality.LOCAL
    return Locality(link.tier.locality) if link.tier.locality else None


def open_scheduler(
    config: OffloadingConfig, settings: OffloadConfig, *, events: bool
) -> KVStrataScheduler:
    """Map the region that the workers made, and open the tiers.

    Raises:
        RegionError: there is no region.
        ConfigError: a tier cannot be used, or no recording be made.
    """
    if settings.without_effect:
        logger.info(
            "kvstrata: keys of vLLM's own specs that do nothing here: %s",
            "; ".join(f"{key} ({why})" for key, why in settings.without_effect.items()),
        )
    region = open_region(config.engine_id)
    region.unlink()
    fields = region.fields
    layouts = layouts_from_json(fields["layouts"])
    fixed = bool(fields["weights_fixed"])
    entries = usable_entries(settings, lora=fields["lora"])
    context = TierContext(
        fields["model"], fields["namespace"] or {}, layouts, region.page_region(), config
    )
    watch = fields.get("weights_watch")
    manager = TieringManager(
        settings,
        region.slots,
        layouts,
        region.view,
        region.is_complete,
        TierOpener(entries, context, private=not fixed),
        Comparer(
            {
                int(group): [Elements(*each) for each in tensors]
                for group, tensors in fields["elements"].items()
            }
        ),
        weights_fixed=fixed,
        windows={int(group): tokens for group, tokens in fields["windows"].items()},
        weights_changed=WeightWatch(watch).changed if watch and entries else None,
        ready=region.progress.usable,
        ahead=fields["steps_ahead"],
    )
    region.progress.serve()
    labels = info_labels(context.namespace)
    logger.info(
        "kvstrata %s: CPU tier of %d pages of %s (%s), %d of them ready; secondary tiers: %s; "
        "namespace %s",
        labels[0],
        region.slots,
        format_bytes(region.slot_bytes),
        format_bytes(region.slots * region.slot_bytes),
        manager.primary.slots,
        ", ".join(map(_described, entries)) or "none",
        directory_name(context.model, labels[1]) if labels[1] else "none",
    )
    sizes = _sizes(manager, region)
    info = partial(
        config_info,
        config,
        settings,
        list(zip(entries, [link.medium for link in manager.links], strict=True)),
        slots=region.slots,
        slot_bytes=region.slot_bytes,
        weights_fixed=fixed,
    )
    return KVStrataScheduler(
        *(manager, region),
        events=events,
        info=info,
        caps=has_partial_tails(config),
        stats=StatsReader(sizes, labels),
        log_interval_s=settings.log_interval_s,
        recorder=_recorder(settings.record, config, manager, sizes),
    )
