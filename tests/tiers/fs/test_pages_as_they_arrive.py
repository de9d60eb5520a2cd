"""A load's pages are used as they arrive, and a request's jobs are one access."""

from collections.abc import Callable, Iterable

import pytest

from kvstrata.tiers.base import JobResult, RequestView
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.process import tier as tier_module
from kvstrata.tiers.process.messages import Kind, Task
from kvstrata.tiers.process.supervisor import Ended
from kvstrata.tiers.testing import CONTEXT, Slots, make_data, make_job, make_key, store
from tests.waiting import wait_until

OpenTier = Callable[..., FsTier]
SIZE = CONTEXT.layouts[2].nbytes
KEYS = [make_key(n, group=2) for n in range(5)]


def test_pages_arrive_one_task_after_the_other(
    open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tier_module, "_TASK_BYTES", 1)  # a task for each page
    tier = open_tier()
    missing = KEYS[3]
    store(tier, {key: make_data(n, SIZE) for n, key in enumerate(KEYS) if key != missing})
    processes = tier.processes[0]
    take = processes.take_ended
    look = processes.look
    came: list[Ended] = []
    order = iter(sorted(KEYS))

    def one_by_one() -> list[Ended]:
        """Once all have ended, in prefix order."""
        came.extend(take())
        if len(came) < len(KEYS) or (key := next(order, None)) is None:
            return []
        return [ended for ended in came if ended.task.keys[0] == key]

    monkeypatch.setattr(processes, "look", lambda: look() or True)
    monkeypatch.setattr(processes, "take_ended", one_by_one)
    slots = Slots.make(len(KEYS), SIZE)
    tier.submit_load(make_job(7, KEYS, slots, CONTEXT))
    told: list[bytes] = []

    def ends() -> bool:
        results.extend(tier.get_finished())
        for job_id, keys in tier.get_arrived().items():
            assert job_id == 7 and len(list(keys)) == 1
            told.extend(keys)
        return bool(results)

    results: list[JobResult] = []
    wait_until(ends)
    assert told == KEYS[:3], "the last one ended the job"
    assert results[0].failed == {missing: "missing"}
    assert bytes(slots.view(4)) == make_data(4, SIZE)


@pytest.mark.parametrize("kind", [Kind.LOAD, Kind.STORE])
def test_the_jobs_of_a_request_are_one_access(
    kind: Kind, open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that of what one request read and wrote the deepest pages are evicted first."""
    tier = open_tier()
    submit_job = tier.submit_load if kind is Kind.LOAD else tier.submit_store
    submit, accesses = tier.processes[0].submit, []

    def watched(tasks: Iterable[Task]) -> None:
        tasks = list(tasks)
        accesses.extend(task.access for task in tasks if task.kind is kind)
        submit(tasks)

    monkeypatch.setattr(tier.processes[0], "submit", watched)
    one, two = RequestView("one"), RequestView("two")
    slots = Slots.make(1, SIZE)

    def move_for(request: RequestView) -> int:
        submit_job(make_job(len(accesses), KEYS[:1], slots, CONTEXT, request=request))
        return accesses[-1]

    tier.on_new_request(one)
    tier.on_new_request(two)
    first, other = move_for(one), move_for(two)
    assert other > first and move_for(one) == first and move_for(two) == other
    tier.on_request_finished(one)
    tier.on_new_request(one)  # the id is used again
    again = move_for(one)
    assert again > other and move_for(one) == again
    stranger = RequestView("stranger")
    assert move_for(stranger) != move_for(stranger)


def test_loads_and_stores_of_a_request_are_the_same_access(
    open_tier: OpenTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, accesses = open_tier(), []
    monkeypatch.setattr(
        tier.processes[0],
        "submit",
        lambda tasks: accesses.extend(task.access for task in tasks),
    )
    request, slots = RequestView("one"), Slots.make(2, SIZE)
    tier.on_new_request(request)
    tier.submit_load(make_job(0, KEYS[:1], slots, CONTEXT, request=request))
    tier.submit_store(make_job(1, KEYS[1:2], slots, CONTEXT, first=1, request=request))
    assert len(accesses) == 2 and len(set(accesses)) == 1
