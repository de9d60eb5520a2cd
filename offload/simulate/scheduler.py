"""vLLM's scheduler with its OffloadingConnector, modelled: who is served when, and which calls it
makes. What these calls answer is not modelled: it is the manager that says it.

As in vLLM a step gives its tokens to prefills under way, then to requests whose load has ended, and
then to new ones, in order. A request that waits for a page is asked about again in the next step,
and those behind it go on. Stores are offered once the step is made up, and end a step later.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from kvstrata.offload.finding.lookup import Answer
from kvstrata.offload.simulate.gpu_cache import GpuCache
from kvstrata.offload.simulate.setup import Engine, World
from kvstrata.offload.simulate.traces import Request
from kvstrata.tiers.base import PageKey, RequestView

_HIT, _MISS, _PENDING = Answer.HIT, Answer.MISS, Answer.PENDING
# vLLM's defaults on a large GPU: tokens of a step, and requests that are served at once
STEP_TOKENS = 8192
MOST_SERVED = 256
# Of an engine that has nothing to compute and is waited for, so that deadlines are seen
_LONGEST_PAUSE_S = 0.1


@dataclass(slots=True, eq=False)
class _Served:
    """A request under way."""

    request: Request
    view: RequestView
    ends: dict[PageKey, int]  # end token of each chunk, in prefix order
    computed: int = 0  # tokens
    stored: int = 0  # chunks that were offered, or need not be

    @property
    def is_stored(self) -> bool:
        """Whether no chunk need be offered any more."""
        return self.stored >= len(self.request.keys)


@dataclass(slots=True, eq=False)
class _Transfer:
    """Pages on their way between GPU and CPU memory."""

    served: _Served
    keys: list[PageKey]
    is_load: bool
    step: int  # in which it was submitted
    ends: float  # when


@dataclass(slots=True)
class Counts:
    """What became of the requests.

    Attributes:
        ttft: seconds from arrival to the first token, of each request, as they end their prefill.
        gpu_tokens: found in GPU memory.
        loaded: chunks that were loaded from the manager's tiers.
        end: when the last request ended.
    """

    ttft: list[float] = field(default_factory=list)
    gpu_tokens: int = 0
    loaded: int = 0
    end: float = 0.0


class Scheduler:
    """Serves requests to their end.

    Args:
        world: whose manager is called, and whose clock goes on.
        engine: how much it computes at a time, and how fast.
        step_tokens: most tokens of a request in a step, as `max_num_batched_tokens`.

    Attributes:
        gpu: the prefix cache.
        counts: what became of the requests.
    """

    def __init__(self, world: World, engine: Engine, step_tokens: int = STEP_TOKENS) -> None:
        self._manager, self._clock, self._disk = world.manager, world.clock, world.disk
        self._engine, self._speeds = engine, engine.speeds
        self._tokens = engine.tokens_per_chunk
        self._step_tokens = step_tokens
        self.gpu = GpuCache(engine.gpu_bytes // engine.bytes_per_chunk)
        self._step = 0
        self._number = 0
        self._waiting: deque[_Served] = deque()
        self._loaded: deque[_Served] = deque()
        self._prefills: list[_Served] = []
        self._behind: list[_Served] = []  # computed, with stores that found no room
        self._decoding: list[tuple[float, int, _Served]] = []  # a heap of ends
        self._over: list[_Served] = []  # what the next step tells the manager
        self._transfers: list[_Transfer] = []
        self._loading: set[PageKey] = set()  # to be found in GPU memory soon
        self._lanes = {True: 0.0, False: 0.0}  # loads and stores: when the copies under way end
        self.counts = Counts()

    def run(self, requests: Iterable[Request]) -> None:
        """Serve requests, which are in the order of their arrival."""
        arrivals = _Arrivals(iter(requests))
        while True:
            for request in arrivals.until(self._clock.now):
                self._admit(request)
            if self._is_idle and not self._manager.has_pending_work():
                if arrivals.next_at == math.inf:
                    return
                self._clock.reach(arrivals.next_at)
                continue
            batch = self._fill_step()
            self._build_meta(batch)
            if batch:
                self._compute(batch)
            else:
                self._pause(arrivals.next_at)
            self._end_step()

    @property
    def _is_idle(self) -> bool:
        """Whether no request is served, and no transfer under way."""
        return not (
            self._waiting
            or self._loaded
            or self._prefills
            or self._decoding
            or self._over
            or self._transfers
        )

    def _admit(self, request: Request) -> None:
        tokens = self._tokens
        view = RequestView(f"r{self._number}")
        self._number += 1
        ends = dict(
            zip(request.keys, range(tokens, tokens * len(request.keys) + 1, tokens), strict=True)
        )
        self._waiting.append(_Served(request, view, ends))
        self._manager.on_new_request(view)

    # -- a step -------------------------------------------------------------------

    def _fill_step(self) -> list[tuple[_Served, int]]:
        """Who is computed in this step, and how many tokens of each."""
        budget = self._engine.servers * self._step_tokens
        batch: list[tuple[_Served, int]] = []

        def add(served: _Served) -> None:
            nonlocal budget
            left = served.request.tokens - served.computed
            tokens = min(left, self._step_tokens, budget)
            batch.append((served, tokens))
            budget -= tokens
            # others find it from now on
            self.gpu.use(served.request.keys[: (served.computed + tokens) // self._tokens])

        for served in self._prefills:
            if budget:
                add(served)
        room = MOST_SERVED - len(self._prefills) - len(self._decoding)
        while budget and self._loaded and room > 0:
            served = self._loaded.popleft()
            self._prefills.append(served)
            add(served)
            room -= 1
        skipped: list[_Served] = []
        while budget and self._waiting and room > 0:
            served = self._waiting.popleft()
            found = self._look_up(served)
            if found is None:
                skipped.append(served)
            elif not found:
                self._prefills.append(served)
                add(served)
                room -= 1
        self._waiting.extendleft(reversed(skipped))
        return batch

    def _look_up(self, served: _Served) -> int | None:
        """How many chunks are loaded for the request, which then waits for them; 0: it computes.
        None: it is not known yet."""
        request, tokens = served.request, self._tokens
        keys = request.keys
        # vLLM computes the last token in any case
        here = self.gpu.found(keys[: (request.tokens - 1) // tokens])
        found = self._longest(served, here)
        if found is None:
            return None
        hits = keys[here : here + found]
        if self.gpu.chunks and not self._loading.isdisjoint(hits):
            return None  # another request is loading them: they will be in GPU memory
        self.counts.gpu_tokens += here * tokens
        served.computed = min((here + found) * tokens, request.tokens - 1)
        if found:
            served.stored = here + found
            self.counts.loaded += found
            self._manager.prepare_load(hits, served.view)
            self._loading.update(hits)
            self._transfer(served, hits, is_load=True)
        return found

    def _longest(self, served: _Served, start: int) -> int | None:
        """How many chunks from `start` on the manager has; None if it does not know yet."""
        manager, view, ends = self._manager, served.view, served.ends
        lookup, comes = manager.lookup, manager.comes
        tokens, hits, waits, alike = self._tokens, 0, False, False
        end = start * tokens
        for key in served.request.keys[start:]:
            end += tokens
            if alike and comes(key):
                hits += 1
                continue
            answer = lookup(key, end, view)
            if answer is _HIT:
                hits += 1
            elif answer is _MISS:
                manager.missed(key, end, ends, view)
                break
            else:
                waits = True
                if answer is _PENDING:
                    hits += 1
                    alike = manager.answers_alike
        if not hits:
            return 0
        return None if waits else hits

    def _build_meta(self, batch: list[tuple[_Served, int]]) -> None:
        """The step is made up: its end for look-ups, then its stores, and then who has ended."""
        manager = self._manager
        manager.on_step_end()
        manager.take_events()
        for served, tokens in batch:
            self._store(served, served.computed + tokens)
        over, self._over = self._over, []
        behind = [served for served in self._behind if served not in over]
        for served in (*behind, *over):  # for the last time
            self._store(served, served.request.tokens)
        self._behind = [served for served in behind if not served.is_stored]
        for served in over:
            manager.on_request_finished(served.view, served.ends)

    def _store(self, served: _Served, computed: int) -> None:
        keys, ends = served.request.keys, served.ends
        until = min(computed // self._tokens, len(keys))
        if until <= served.stored:
            return
        offered = [(key, ends[key]) for key in keys[served.stored : until]]
        plan = self._manager.prepare_store(offered, served.view)
        if plan is None:
            return
        served.stored = until
        if plan.keys:
            self._transfer(served, plan.keys, is_load=False)

    def _transfer(self, served: _Served, keys: list[PageKey], *, is_load: bool) -> None:
        begins = max(self._clock.now, self._lanes[is_load])
        ends = begins + len(keys) * self._engine.bytes_per_chunk / self._speeds.gpu
        self._lanes[is_load] = ends
        self._transfers.append(_Transfer(served, keys, is_load, self._step, ends))

    def _compute(self, batch: list[tuple[_Served, int]]) -> None:
        """Time passes until the step's tokens are computed."""
        clock, speeds, servers = self._clock, self._speeds, self._engine.servers
        total = sum(tokens for _, tokens in batch)
        longest = max(tokens for _, tokens in batch)
        clock.now += max(total / servers, longest) / speeds.prefill
        for served, tokens in batch:
            request = served.request
            served.computed += tokens
            if served.computed >= request.tokens:
                self.counts.ttft.append(clock.now - request.at)
                end = clock.now + max(0, request.generated - 1) / speeds.decode
                heapq.heappush(self._decoding, (end, self._number_of(served), served))
                if not served.is_stored:
                    self._behind.append(served)
        self._prefills = [
            served for served in self._prefills if served.computed < served.request.tokens
        ]

    @staticmethod
    def _number_of(served: _Served) -> int:
        return int(served.view.req_id[1:])

    def _pause(self, next_arrival: float) -> None:
        """Nothing can be computed until something else ends."""
        ends = [next_arrival]
        if self._disk is not None:
            ends.append(self._disk.next_end)
        ends += [each.ends for each in self._transfers]
        ends += [end for end, _, _ in self._decoding[:1]]
        if self._waiting:
            ends.append(self._clock.now + _LONGEST_PAUSE_S)
        if (end := min(ends)) < math.inf:
            self._clock.reach(end)

    def _end_step(self) -> None:
        """What the workers report."""
        now, step = self._clock.now, self._step
        self._step += 1
        under_way: list[_Transfer] = []
        for each in self._transfers:
            # vLLM's workers are told of a load at once, and of a store in the step after
            if each.ends > now or step - each.step < (1 if each.is_load else 2):
                under_way.append(each)
            elif each.is_load:
                self._manager.complete_load(each.keys, each.served.view)
                self._loading.difference_update(each.keys)
                self.gpu.use(each.served.request.keys[: each.served.stored])
                self._loaded.append(each.served)
            else:
                self._manager.complete_store(each.keys, each.served.view)
        self._transfers = under_way
        while self._decoding and self._decoding[0][0] <= now:
            _, _, served = heapq.heappop(self._decoding)
            self.gpu.use(served.request.keys + served.request.behind)
            self._over.append(served)
            self.counts.end = now


class _Arrivals:
    """Requests that are to come."""

    def __init__(self, requests: Iterator[Request]) -> None:
        self._requests = requests
        self._next = next(requests, None)

    @property
    def next_at(self) -> float:
        """When the next one comes; infinite if none does."""
        return math.inf if self._next is None else self._next.at

    def until(self, now: float) -> Iterator[Request]:
        """Those that have come."""
        while self._next is not None and self._next.at <= now:
            yield self._next
            self._next = next(self._requests, None)
