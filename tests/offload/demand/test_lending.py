"""A tier that serves others is lent pages of the primary tier, and may want all of a request's."""

from collections.abc import Callable, Sequence

import pytest

from kvstrata.offload.finding.lookup import Answer
from kvstrata.offload.primary.slots import Hold
from kvstrata.offload.secondary.guard import GuardedTier
from kvstrata.tiers.base import Job, JobResult, Lookup, PrimaryPages, RequestView
from kvstrata.tiers.memory import MemoryTier
from tests.offload.manager_world import CONTEXT, World, chunk, content

PAGES = [chunk(0, index) for index in range(3)]
KEYS = [key for key, _ in PAGES]
PEER = RequestView("peer")


class Server(MemoryTier):
    """Does at the end of a step what it is told to, with the primary tier's pages."""

    whole_loads = True

    serves = True

    def __init__(self) -> None:
        super().__init__({}, CONTEXT)
        self.does: Callable[[PrimaryPages], object] = lambda pages: None
        self.ended: list[JobResult] = []
        self.stored: list[Sequence[bytes]] = []
        self.loads: list[Sequence[bytes]] = []
        self.wants_all = False

    def on_new_request(self, request: RequestView) -> bool:
        return self.wants_all

    def submit_store(self, job: Job) -> None:
        self.stored.append(job.keys)
        super().submit_store(job)

    def submit_load(self, job: Job) -> None:
        self.loads.append(job.keys)
        super().submit_load(job)

    def serve(self, pages: PrimaryPages) -> None:
        self.does(pages)

    def wants_steps(self) -> bool:
        return self.wants_all

    def get_finished(self) -> Sequence[JobResult]:
        ended, self.ended = self.ended, []
        return [*ended, *super().get_finished()]


def world_of(server: Server, *others: MemoryTier, slots: int = 8) -> World:
    return World([GuardedTier(type(each).__name__, each) for each in (server, *others)], slots)


def test_lent_pages_stay_until_the_job_ends() -> None:
    server = Server()
    world = world_of(server, slots=3)
    world.store(PAGES, world.request())
    world.step()
    lent: list[Job] = []

    def lend(pages: PrimaryPages) -> None:
        assert [pages.lookup(key, PEER) for key in [*KEYS, b"none" + KEYS[0][-4:]]] == [
            *[Lookup.HIT] * 3,
            Lookup.MISS,
        ]
        lent.append(pages.lend(KEYS, PEER))
        pages.over(PEER)

    server.does = lend
    world.step()
    server.does = lambda pages: None
    (job,) = lent
    assert [bytes(page.view) for page in job.pages] == [content(key) for key in KEYS]
    world.manager.on_request_finished(RequestView("r"))
    assert not world.manager.serving
    assert world.manager.primary.held[Hold.CASCADE] == 3
    assert world.manager.prepare_store([chunk(1, 0)], world.request("next")) is None
    server.ended = [JobResult(job.job_id)]
    world.step()
    assert world.manager.primary.held[Hold.CASCADE] == 0
    world.store([chunk(1, 0)], RequestView("next"))


def test_what_another_tier_has_is_promoted_for_others_too() -> None:
    server, other = Server(), MemoryTier({}, CONTEXT)
    other._pages[KEYS[0]] = content(KEYS[0])
    server._pages[KEYS[1]] = content(KEYS[1])  # its own pages it knows
    world = world_of(server, other)
    answers: list[list[Lookup]] = []
    server.does = lambda pages: answers.append([pages.lookup(key, PEER) for key in KEYS[:2]])
    world.step(3)
    assert answers[0] == [Lookup.RETRY, Lookup.MISS]
    assert answers[-1] == [Lookup.HIT, Lookup.MISS]


def test_a_page_that_is_not_here_is_not_lent(caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    world = world_of(server)
    server.does = lambda pages: pages.lend(KEYS, PEER)
    world.step()
    assert server.stats().failures == {}
    assert world.tiers[0].stats().failures == {"raised-in-serve": 1}
    assert not world.manager.has_pending_work()


def test_one_that_wants_all_pages_is_given_each_once_more() -> None:
    server = Server()
    world = world_of(server)
    world.store(PAGES[:2], world.request("first"))
    world.step()
    server.wants_all = True
    assert world.manager.has_pending_work()
    second = RequestView("second")
    assert world.manager.on_new_request(second)
    world.store(PAGES, second)
    world.store(PAGES, second)
    assert server.stored == [KEYS[:2], KEYS[:2], KEYS[2:]]
    server.wants_all = False
    assert not world.manager.on_new_request(RequestView("third"))


def test_the_pages_of_a_step_are_asked_for_in_one_job() -> None:
    server = Server()
    pages = [chunk(2, index) for index in range(40)]
    server._pages.update({key: content(key) for key, _ in pages})
    world = world_of(server, slots=100)
    request = world.request()
    assert {world.lookup(page, request) for page in pages} == {Answer.PENDING}
    world.step()
    assert server.loads == [[key for key, _ in pages]]
