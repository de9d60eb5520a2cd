"""Plays a load on a manager as vLLM's scheduler does, without an engine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from tests.bench.eviction.prefixes import Chunk

_TOKENS = 16  # of a chunk


class Player:
    """Requests that come one after the other, each with all its transfers done in time.

    Args:
        manager: a vLLM OffloadingManager.
        groups: KV cache groups, all of full attention: a chunk is of use if all have it.
        step: chunks that are computed in one step.
    """

    def __init__(self, manager: Any, groups: int, step: int) -> None:
        self._manager = manager
        self._groups = range(groups)
        self._step = step
        self._count = 0

    def play(self, chunks: Sequence[Chunk]) -> int:
        """One request; how many of its first chunks were loaded."""
        from vllm.v1.kv_offload.base import ReqContext, ScheduleEndContext

        manager, groups = self._manager, self._groups
        self._count += 1
        context = ReqContext(f"request {self._count}")
        keys = [[_key(chunk, group) for chunk in chunks] for group in groups]
        for of in keys:
            for place, key in enumerate(of, 1):
                context.set_offload_key_position(key, place * _TOKENS)
        manager.on_new_request(context)
        end = ScheduleEndContext((), ())
        while (loaded := self._look_up(keys, context)) is None:
            manager.on_schedule_end(end)
        if hits := [key for of in keys for key in of[:loaded]]:
            manager.prepare_load(hits, context)
            manager.on_schedule_end(end)
            manager.complete_load(hits, context)
        for start in range(loaded, len(chunks), self._step):
            offered = [key for of in keys for key in of[start : start + self._step]]
            plan = manager.prepare_store(offered, context)
            manager.on_schedule_end(end)
            if plan is not None and plan.keys_to_store:
                manager.complete_store(set(plan.keys_to_store), context)
        manager.on_request_finished(context)
        manager.on_schedule_end(end)
        for _ in manager.take_events():
            pass
        return loaded

    def _look_up(self, keys: Sequence[Sequence[Any]], context: Any) -> int | None:
        """How many of the first chunks are there for all groups; None while that is not known."""
        from vllm.v1.kv_offload.base import LookupResult

        there, wait = len(keys[0]), False
        for of in keys:
            for place, key in enumerate(of[:there]):
                found = self._manager.lookup(key, context)
                if found is LookupResult.MISS:
                    there = place
                    break
                wait = wait or found is not LookupResult.HIT
        return None if wait else there


def _key(chunk: Chunk, group: int) -> Any:
    from vllm.v1.kv_offload.base import make_offload_key

    name = b"%d %d" % chunk
    return make_offload_key(hashlib.blake2b(name, digest_size=32).digest(), group)
