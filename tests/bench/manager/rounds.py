"""Requests through a manager, call by call as vLLM's scheduler makes them, each call timed."""

from __future__ import annotations

import gc
import importlib
import os
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from tests.bench.manager.contestants import OURS, STOCK, make

CHUNKS = 64  # of a request
MOST_AUDITED = 10  # one request in so many: audits take a thousandth of the look-ups
RUNNING = 128  # other requests that the engine has
_TOKENS = 256  # of a chunk
_GROUP = bytes(4)
T = TypeVar("T")

HIT, MISS = "lookup, hit", "lookup, miss"
STORING, PROMOTING = "lookup, page being stored", "lookup, page being promoted"
FREE, EVICTING = "prepare_store, room is free", "prepare_store, evicting"
EVICTION = "eviction (the difference)"
STORED, LOAD, LOADED = "complete_store", "prepare_load", "complete_load"
PROMOTE, ARRIVE = "lookup, starts a promotion", "on_schedule_end, promotions sent and ended"
STEP, STATS = "on_schedule_end, nothing to do", "get_stats"
FINISHED = "on_request_finished"
STORE_ALL, LOAD_ALL = "stored request, all calls", "loaded request, all calls"
COLLECTION = "full garbage collection"
PER_CHUNK, PER_CALL, AT_ONCE = "us/chunk", "us", "ms"


class Figure(NamedTuple):
    """One number, the median of its rounds.

    Attributes:
        contestant: who was measured.
        tiers: how many secondary tiers it has.
        resident: pages in its primary tier, which is full.
        operation: what it did.
        unit: of `value`.
        value: the number.
    """

    contestant: str
    tiers: int
    resident: int
    operation: str
    unit: str
    value: float

    @property
    def case(self) -> str:
        """What was measured, in words."""
        return f"{self.operation} ({self.resident:,}, {self.tiers} tiers)"


class WrongAnswer(AssertionError):
    """A manager did not do what the benchmark means to measure."""


class Player:
    """Plays requests through one manager and keeps the times of its calls."""

    def __init__(self, manager: Any) -> None:
        from vllm.v1.kv_offload.base import ReqContext, ScheduleEndContext

        self.manager = manager
        self.seconds: dict[str, list[float]] = defaultdict(list)  # of one call, or of 64 look-ups
        self._context: Any = ReqContext
        self._step = ScheduleEndContext((), ())
        self._spent = 0.0  # on the present request
        self._asked = self._audited = 0  # requests that should hit
        for index in range(RUNNING):
            manager.on_new_request(ReqContext(f"running-{index}"))

    def store(self, name: str, keys: Sequence[bytes], operation: str) -> None:
        """A request finds nothing and stores its chunks; `operation` names its prepare_store."""
        request = self._arrive(name, keys)
        self._look_up(MISS, keys, request, "MISS")
        plan = self._time(operation, lambda: self.manager.prepare_store(keys, request))
        if plan is None or len(plan.keys_to_store) != len(keys):
            raise WrongAnswer("not all chunks of a new request were stored")
        self._end_step()
        spent = self._spent
        self._look_up(STORING, keys, request, "HIT_PENDING")
        self._spent = spent  # an engine would not ask
        stored = set(plan.keys_to_store)
        self._time(STORED, lambda: self.manager.complete_store(stored, request))
        self._finish(request, STORE_ALL)

    def load(self, name: str, keys: Sequence[bytes]) -> None:
        """A request finds its chunks in the primary tier and loads them."""
        request = self._arrive(name, keys)
        if not self._look_up(HIT, keys, request, "HIT"):
            self.manager.on_request_finished(request)
            self._end_step()
            return
        self._time(LOAD, lambda: self.manager.prepare_load(keys, request))
        self._end_step()
        loaded = set(keys)
        self._time(LOADED, lambda: self.manager.complete_load(loaded, request))
        self._finish(request, LOAD_ALL)

    def promote(self, name: str, keys: Sequence[bytes]) -> None:
        """A request finds its chunks in the secondary tier, and in a later step promoted."""
        request = self._arrive(name, keys)
        self._look_up(PROMOTE, keys, request, "HIT_PENDING")
        self._look_up(PROMOTING, keys, request, "HIT_PENDING")
        self._time(ARRIVE, lambda: self._end_step(2))
        self._look_up("lookup, promoted", keys, request, "HIT")
        self._finish(request, "promoted request, all calls")

    def rest(self) -> None:
        """A step in which nothing is stored or loaded; the engine asks for the counts in each."""
        self._time(STEP, self._end_step)
        self._time(STATS, self.manager.get_stats)

    def _arrive(self, name: str, keys: Sequence[bytes]) -> Any:
        request = self._context(name)
        for index, key in enumerate(keys):
            request.set_offload_key_position(key, (index + 1) * _TOKENS)
        self._spent = 0.0
        self._time("on_new_request", lambda: self.manager.on_new_request(request))
        return request

    def _look_up(self, operation: str, keys: Sequence[bytes], request: Any, answer: str) -> bool:
        """Whether that was the answer: a few hits are audited."""
        lookup = self.manager.lookup
        answers = self._time(operation, lambda: [lookup(key, request) for key in keys])
        self._asked += answer == "HIT"
        if {found.name for found in answers} == {answer}:
            return True
        self._audited += 1
        if answer != "HIT" or self._audited > 1 + self._asked // MOST_AUDITED:
            raise WrongAnswer(f"{operation}: not all look-ups said {answer}")
        while "HIT_PENDING" in {found.name for found in answers}:  # it is put off at first
            self._end_step()
            answers = [lookup(key, request) for key in keys]
        if "MISS" in {found.name for found in answers[:-1]}:
            raise WrongAnswer(f"{operation}: not all look-ups said {answer}")
        return False

    def _finish(self, request: Any, total: str) -> None:
        """The request ends; what its stores left to do is done in the steps that follow."""
        self._time(FINISHED, lambda: self.manager.on_request_finished(request))
        self._time("on_schedule_end, stores ended", self._end_step)
        self._end_step()
        self.seconds[total].append(self._spent)

    def _end_step(self, times: int = 1) -> None:
        for _ in range(times):
            self.manager.on_schedule_end(self._step)

    def _time(self, operation: str, call: Callable[[], T]) -> T:
        start = time.perf_counter()
        answer = call()
        seconds = time.perf_counter() - start
        self.seconds[operation].append(seconds)
        self._spent += seconds
        return answer


def measure(resident: int, tiers: int, rounds: int) -> Iterator[Figure]:
    """Both managers with a full primary tier of `resident` pages, each round one after the other.

    In a round each stores a new request, loads one that is resident and, where there is a
    secondary tier, gets one promoted that only this tier has.
    """
    importlib.import_module("kvstrata.offload.vllm_plugin.scheduler")  # with all of vLLM
    gc.collect()
    gc.freeze()  # as vLLM does when its engine is up
    players = {name: Player(make(name, resident, bool(tiers))) for name in (OURS, STOCK)}
    _play(players, resident, rounds, tiers=bool(tiers))
    for name in players:
        yield from _figures(name, players[name], tiers, resident)
    for player in players.values():
        player.manager.shutdown()
    players.clear()
    for name in (OURS, STOCK):
        yield Figure(name, tiers, resident, COLLECTION, AT_ONCE, _collection(name, tiers, resident))
    gc.unfreeze()


def _play(players: dict[str, Player], resident: int, rounds: int, *, tiers: bool) -> None:
    requests = _fill(players, resident, rounds)
    for player in players.values():
        for operation in {*player.seconds} - {FREE}:
            del player.seconds[operation]
        player.seconds[FREE] = player.seconds[FREE][-rounds:]
    # the least recently used quarters leave first, and at least one request stays
    hot = max(1, resident // CHUNKS // 4)
    for index in range(rounds):
        new, old = _keys(), random.choice(requests[-hot:])
        for name in random.sample([*players], len(players)):
            players[name].store(f"store-{index}", new, EVICTING)
            players[name].load(f"load-{index}", old)
            if tiers:
                players[name].promote(f"promote-{index}", requests[index])
            players[name].rest()
        requests.append(new)


def _fill(players: dict[str, Player], resident: int, extra: int) -> list[list[bytes]]:
    """Store requests until the primary tiers are full, after `extra` that they will have lost."""
    requests = [_keys() for _ in range(extra + resident // CHUNKS)]
    for index, keys in enumerate(requests):
        room = (index + 1) * CHUNKS <= resident
        for player in players.values():
            player.store(f"fill-{index}", keys, FREE if room else EVICTING)
            player.manager.get_stats()
    return requests


def _keys() -> list[bytes]:
    return [os.urandom(32) + _GROUP for _ in range(CHUNKS)]


def _figures(name: str, player: Player, tiers: int, resident: int) -> Iterator[Figure]:
    medians = {op: statistics.median(seconds) * 1e6 for op, seconds in player.seconds.items()}
    for operation, value in medians.items():
        if operation in (STEP, STATS):
            yield Figure(name, tiers, resident, operation, PER_CALL, value)
        else:
            yield Figure(name, tiers, resident, operation, PER_CHUNK, value / CHUNKS)
    difference = (medians[EVICTING] - medians[FREE]) / CHUNKS
    yield Figure(name, tiers, resident, EVICTION, PER_CHUNK, difference)


def _collection(name: str, tiers: int, resident: int) -> float:
    """What a manager's pages add to a full garbage collection, which stops the engine, in ms."""
    gc.collect()
    gc.freeze()  # whatever the others have left
    before = _collect()
    player = Player(make(name, resident, bool(tiers)))
    _fill({name: player}, resident, 0)
    player.seconds.clear()  # which are objects, too
    seconds = _collect() - before
    player.manager.shutdown()
    return max(0.0, round(seconds * 1e3, 1))  # less is noise


def _collect() -> float:
    def once() -> float:
        start = time.perf_counter()
        gc.collect()
        return time.perf_counter() - start

    return min(once() for _ in range(5))  # the first frees what nobody holds any more
