"""The guard: whatever a tier does, the engine sees an answer."""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import pytest

from kvstrata.offload.secondary.guard import GuardedTier, check_words
from kvstrata.tiers.base import (
    Job,
    JobResult,
    Lookup,
    PageLayout,
    PrimaryPages,
    RequestView,
    SecondaryTier,
    TensorSpec,
    TierConfigError,
    TierContext,
    TierStats,
)
from kvstrata.tiers.memory import MemoryTier

REQUEST = RequestView("request")
KEY, OTHER = b"hash\0\0\0\0", b"hush\0\0\0\0"


class NoPages:
    """A primary tier that has none."""

    def lookup(self, key: bytes, request: RequestView) -> Lookup:
        return Lookup.MISS

    def lend(self, keys: Sequence[bytes], request: RequestView) -> Job:
        return job(9, *keys)

    def over(self, request: RequestView) -> None:
        pass


PAGES = NoPages()


class Broken(SecondaryTier):
    """Calls `act` in every method."""

    locality = "REMOTE"

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        pass

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act = act

    def lookup(self, key: bytes, request: RequestView) -> Lookup:
        return self.act()

    def submit_store(self, job: Job) -> None:
        self.act()

    def submit_load(self, job: Job) -> None:
        self.act()

    def submit_reject(self, job: Job, *, distrust: bool) -> bool:
        return self.act()

    def how_to_trust(self) -> str:
        return self.act()

    def get_finished(self) -> Sequence[JobResult]:
        return self.act()

    def get_arrived(self) -> Mapping[int, Collection[bytes]]:
        return self.act()

    def touch(self, keys: Collection[bytes], request: RequestView) -> None:
        self.act()

    def on_new_request(self, request: RequestView) -> bool:
        return self.act()

    def on_request_finished(self, request: RequestView) -> None:
        self.act()

    def on_step_end(self) -> None:
        self.act()

    def serve(self, pages: PrimaryPages) -> None:
        self.act()

    def wants_steps(self) -> bool:
        return self.act()

    def take_changes(self, most: int, *, anew: bool = False) -> Iterable[tuple[bytes, bool]]:
        return self.act()

    def drain(self, timeout_s: float) -> bool:
        return self.act()

    def shutdown(self, timeout_s: float) -> bool:
        return self.act()

    def stats(self) -> TierStats:
        return self.act()


def fail() -> None:
    raise RuntimeError("broken")


def job(job_id: int, *keys: bytes) -> Job:
    nothing = [0] * len(keys)
    return Job(job_id, keys, nothing, nothing, REQUEST, lambda key, slot: memoryview(bytearray(4)))


def call_all(tier: SecondaryTier) -> list[Any]:
    """The answers of every method, twice."""
    answers: list[Any] = []
    for _ in range(2):
        answers += [
            tier.lookup(KEY, REQUEST),
            tier.submit_store(job(1, KEY, OTHER)),
            tier.submit_load(job(2, KEY)),
            tier.submit_reject(job(3, KEY), distrust=True),
            tier.how_to_trust(),
            tier.get_finished(),
            tier.get_arrived(),
            tier.touch([KEY], REQUEST),
            tier.on_new_request(REQUEST),
            tier.on_request_finished(REQUEST),
            tier.on_step_end(),
            tier.serve(PAGES),
            tier.wants_steps(),
            list(tier.take_changes(9)),
            tier.drain(0.1),
            tier.shutdown(0.1),
            tier.stats(),
        ]
    return answers


METHODS = sorted(
    name
    for name, member in vars(SecondaryTier).items()
    if callable(member) and not isinstance(member, type) and not name.startswith("_")
)


def test_a_tier_that_raises_in_every_method(caplog: pytest.LogCaptureFixture) -> None:
    guard = GuardedTier("sick", Broken(fail))
    with caplog.at_level(logging.ERROR, "kvstrata.tiers"):
        answers = call_all(guard)
    refused = [
        JobResult(1, {KEY: "raised-in-submit_store", OTHER: "raised-in-submit_store"}),
        JobResult(2, {KEY: "raised-in-submit_load"}),
    ]
    trust = "Restart the engine to use it again."
    first = [Lookup.MISS, None, None, False, trust, refused, {}, None]
    first += [False, None, None, None, False, [], False, False]
    assert answers[:16] == first
    assert answers[17:33] == first
    assert guard.stats().failures == {f"raised-in-{name}": 2 for name in METHODS} | {
        "raised-in-stats": 3
    }
    logged = [record.getMessage() for record in caplog.records]
    assert sorted(logged) == [f"tier sick raised in {name}" for name in METHODS], "once each"
    assert all(record.exc_info for record in caplog.records)


@pytest.mark.parametrize(
    "garbage",
    [None, 7, "HIT", [None], [b"x", 3], iter([1])],
    ids=["None", "7", "HIT", "[None]", "[b'x', 3]", "an iterator"],
)
def test_a_tier_that_answers_nonsense(garbage: Any) -> None:
    answers = call_all(GuardedTier("odd", Broken(lambda: garbage)))
    assert answers[0] is not Lookup.HIT and answers[0] is not Lookup.RETRY
    assert answers[3] is False
    assert answers[5] == [] and answers[6] == {}
    assert isinstance(answers[14], bool) and isinstance(answers[15], bool)
    assert isinstance(answers[16], TierStats)


def test_a_generator_that_raises_late() -> None:
    def late() -> Iterable[tuple[bytes, bool]]:
        yield KEY, True
        raise OSError("late")

    guard = GuardedTier("late", Broken(late))
    assert list(guard.take_changes(9)) == []
    assert guard.get_finished() == []
    assert guard.stats().failures["raised-in-take_changes"] == 1


def test_results_that_end_no_job_are_dropped() -> None:
    results: list[Any] = []
    tier = Broken(lambda: results)
    guard = GuardedTier("chatty", tier)
    guard.submit_load(job(5, KEY))
    results[:] = [JobResult(4), JobResult(5), JobResult(5), None]
    assert guard.get_finished() == [JobResult(5)]
    results[:] = [JobResult(5)]
    assert guard.get_finished() == []
    tier.act = TierStats
    assert guard.stats().failures == {"unknown-result": 4}


class Hostile(dict[bytes, str]):
    """No mapping at all, once somebody looks."""

    def __contains__(self, key: object) -> bool:
        raise OSError("gone")


ALL_WRONG = {KEY: "wrong-result", OTHER: "wrong-result"}


@pytest.mark.parametrize(
    ("reported", "passed"),
    [
        ({"failed": {b"foreign": "missing"}}, {}),
        ({"failed": {KEY: "missing", b"foreign": "x", 7: "y"}}, {"failed": {KEY: "missing"}}),
        ({"failed": {KEY: OSError("disk")}}, {"failed": {KEY: "disk"}}),
        (
            {"failed": {KEY: ["unhashable"], OTHER: None}},
            {"failed": {KEY: "['unhashable']", OTHER: "None"}},
        ),
        ({"failed": {KEY: "x" * 10_000}}, {"failed": {KEY: "x" * 100}}),
        ({"failed": None}, {"failed": ALL_WRONG}),
        ({"failed": [KEY]}, {"failed": ALL_WRONG}),
        ({"failed": Hostile({KEY: "missing"})}, {"failed": ALL_WRONG}),
        ({"nbytes": None}, {}),
        ({"nbytes": "7"}, {}),
        ({"nbytes": -1}, {}),
        ({"nbytes": 1.5}, {}),
        ({"nbytes": 10**400}, {}),
        ({"nbytes": 4, "seconds": None}, {"nbytes": 4}),
        ({"nbytes": 4, "seconds": -1.0}, {"nbytes": 4}),
        ({"seconds": float("nan")}, {}),
        ({"seconds": float("inf")}, {}),
        ({"seconds": "soon", "nbytes": [4], "failed": {KEY: "io"}}, {"failed": {KEY: "io"}}),
    ],
    ids=repr,
)
def test_a_result_with_wrong_fields_is_put_right(
    reported: dict[str, Any], passed: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    results: list[Any] = []
    tier = Broken(lambda: results)
    guard = GuardedTier("odd", tier)
    with caplog.at_level(logging.ERROR, "kvstrata.tiers"):
        for job_id in (5, 6):
            guard.submit_load(job(job_id, KEY, OTHER))
            results[:] = [JobResult(job_id, **reported)]
            assert guard.get_finished() == [JobResult(job_id, **passed)]
    tier.act = TierStats
    assert guard.stats().failures == {"wrong-result": 2}
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"nbytes": 8, "seconds": 0.5},
        {"nbytes": 8, "seconds": 1},
        {"failed": {KEY: "missing"}, "nbytes": 4},
        {"failed": MappingProxyType({OTHER: "checksum", KEY: ""})},
    ],
    ids=repr,
)
def test_a_sound_result_is_not_a_mistake(fields: dict[str, Any]) -> None:
    results: list[Any] = []
    tier = Broken(lambda: results)
    guard = GuardedTier("fine", tier)
    guard.submit_store(job(5, KEY, OTHER))
    results[:] = [JobResult(5, **fields)]
    assert guard.get_finished() == results
    tier.act = TierStats
    assert guard.stats().failures == {}


@pytest.mark.parametrize(
    "stats",
    [
        TierStats(counters={"stored": None}),  # type: ignore[dict-item]
        TierStats(counters={"stored": 3}, gauges={"queue": "long"}),  # type: ignore[dict-item]
        TierStats(failures={7: 1}),  # type: ignore[dict-item]
        TierStats(failures=[]),  # type: ignore[arg-type]
    ],
    ids=repr,
)
def test_stats_that_are_no_numbers_are_left_out(stats: TierStats) -> None:
    guard = GuardedTier("odd", Broken(lambda: stats))
    assert guard.stats() == TierStats(failures={"raised-in-stats": 1})


@pytest.mark.parametrize("odd", [[1], ([1], True), (KEY,), KEY, (KEY, True, 1)], ids=repr)
def test_changes_that_are_none_are_left_out(odd: Any) -> None:
    changes: list[Any] = [(KEY, True), odd]
    guard = GuardedTier("odd", Broken(lambda: changes))
    assert list(guard.take_changes(9)) == []
    changes.pop()
    assert list(guard.take_changes(9)) == [(KEY, True)]


def test_a_result_whose_job_cannot_be_looked_up() -> None:
    odd: list[Any] = [JobResult([5]), JobResult(None), JobResult("5")]  # type: ignore[arg-type]
    guard = GuardedTier("odd", Broken(lambda: odd))
    guard.submit_store(job(5, KEY))
    assert guard.get_finished() == []


@pytest.mark.parametrize(
    ("told", "taken", "mistakes"),
    [
        ({5: [KEY]}, {5: {KEY}}, 0),
        ({5: (key for key in (KEY, OTHER))}, {5: {KEY, OTHER}}, 0),
        ({5: [KEY, KEY]}, {5: {KEY}}, 0),
        ({5: [KEY, b"strange"]}, {5: {KEY}}, 1),
        ({5: [b"strange"]}, {}, 1),
        ({4: [KEY]}, {}, 1),  # a store
        ({7: [KEY], 5: [OTHER]}, {5: {OTHER}}, 1),  # no job
        ({"5": [KEY]}, {}, 1),
        ({5: ["key"]}, {}, 1),
        ({5: KEY}, {}, 1),
        ([5, KEY], {}, 1),
        ({5: []}, {}, 0),
    ],
)
def test_only_pages_of_loads_under_way_arrive(told: Any, taken: Any, mistakes: int) -> None:
    tier = Broken(lambda: told)
    guard = GuardedTier("early", tier)
    guard.submit_store(job(4, KEY))
    guard.submit_load(job(5, KEY, OTHER))
    assert {job_id: set(keys) for job_id, keys in guard.get_arrived().items()} == taken
    tier.act = TierStats
    assert sum(guard.stats().failures.values()) == mistakes


def test_a_page_arrives_once_and_for_good() -> None:
    """The manager may have given it to a request."""
    tier = Broken(lambda: {5: [KEY]})
    guard = GuardedTier("early", tier)
    guard.submit_load(job(5, KEY, OTHER))
    assert guard.get_arrived() == {5: {KEY}} and guard.get_arrived() == {}
    tier.act = lambda: [JobResult(5, {KEY: "checksum", OTHER: "missing"})]
    assert guard.get_finished() == [JobResult(5, {OTHER: "missing"})]
    tier.act = lambda: {5: [OTHER]}
    assert guard.get_arrived() == {}, "the job has ended"
    tier.act = TierStats
    assert guard.stats().failures == {"unknown-arrival": 2, "wrong-result": 1}


def test_a_refused_job_ends_once() -> None:
    """It raised after it took the job, and reports the job's end as well."""
    tier = Broken(fail)
    guard = GuardedTier("half", tier)
    guard.submit_load(job(5, KEY))
    tier.act = lambda: [JobResult(5)]
    assert guard.get_finished() == [JobResult(5, {KEY: "raised-in-submit_load"})]
    assert guard.get_finished() == []


def test_interrupts_pass() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        GuardedTier("any", Broken(interrupt)).lookup(KEY, REQUEST)


def test_a_healthy_tier_is_passed_through() -> None:
    context = TierContext("m", {}, {0: PageLayout((TensorSpec("kv", "U8", (4,)),), 1)})
    inner = MemoryTier({"max_bytes": 4}, context)
    guard = GuardedTier("memory", inner)
    assert guard.inner is inner and guard.locality == "LOCAL"
    guard.submit_store(job(1, KEY))
    guard.submit_store(job(2, OTHER))
    assert [(r.job_id, dict(r.failed), r.nbytes) for r in guard.get_finished()] == [
        (1, {}, 4),
        (2, {}, 4),
    ]
    assert guard.tells_changes
    assert list(guard.take_changes(9)) == [(OTHER, True)]
    assert guard.lookup(KEY, REQUEST) is Lookup.MISS
    assert guard.lookup(OTHER, REQUEST) is Lookup.HIT
    assert guard.stats() == inner.stats()
    assert guard.drain(1) and guard.shutdown(1)
    assert guard.lookup(OTHER, REQUEST) is Lookup.MISS


@pytest.mark.parametrize("medium", [None, "CPU", "STORAGE"])
@pytest.mark.parametrize("locality", [None, "LOCAL", "REMOTE"])
def test_words_that_vllm_has(medium: str | None, locality: str | None) -> None:
    check_words("mine", type("Mine", (Broken,), {"medium": medium, "locality": locality})(fail))


@pytest.mark.parametrize(
    ("attribute", "value", "remedy"),
    [
        ("medium", "Disk", 'use "CPU" or "STORAGE"'),
        ("medium", "", 'use "CPU" or "STORAGE"'),
        ("medium", ["CPU"], 'use "CPU" or "STORAGE"'),
        ("locality", "local", 'use "LOCAL" or "REMOTE"'),
        ("page_causes", ("full",), "use a frozenset of words"),
        ("page_causes", "full", "use a frozenset of words"),
        ("page_causes", {1}, "use a frozenset of words"),
        ("page_causes", None, "use a frozenset of words"),
    ],
)
def test_other_words_are_refused(attribute: str, value: Any, remedy: str) -> None:
    tier = type("Mine", (Broken,), {attribute: value})(fail)
    with pytest.raises(TierConfigError) as caught:
        check_words("mine-2", tier)
    text = str(caught.value)
    assert text.startswith(f"tier mine-2: its class Mine has {attribute} = {value!r}; {remedy}")
