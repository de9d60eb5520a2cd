"""Who is served next, and what is dropped."""

from kvstrata.offload.primary.slots import Entry, Writer
from kvstrata.offload.request.request import RequestState
from kvstrata.offload.secondary.costs import Timing
from kvstrata.offload.secondary.load_queue import LoadQueue
from kvstrata.tiers.base import RequestView

SIZE = 10


def request(name: str) -> RequestState:
    state = RequestState(RequestView(name))
    state.needs = name
    return state


def add(queue: LoadQueue, state: RequestState, ends: list[int], group: int = 0) -> Timing:
    entries = [Entry(bytes([end, 0, 0, 0, group]), end, end, Writer.TIER) for end in ends]
    timing = Timing(0.0, SIZE * len(ends), len(ends))
    queue.add(state, entries, [SIZE] * len(ends), timing)
    return timing


def take_all(queue: LoadQueue, most: int) -> list[tuple[str, list[int]]]:
    jobs = []
    while queue:
        state, entries, _ = queue.take(most)
        jobs.append((state.view.req_id, [entry.end_token for entry in entries]))
    assert queue.ahead("any", 0) == 0
    return jobs


def test_requests_take_turns() -> None:
    queue = LoadQueue()
    add(queue, request("a"), [1, 2, 3, 4, 5])
    add(queue, request("b"), [1, 2])
    assert len(queue) == 2 and queue.pages("a") == 5 and queue.pages("c") == 0
    assert queue.ahead("a", SIZE) == 6 * SIZE + 2 * SIZE
    assert queue.ahead("b", 0) == 2 * SIZE + 2 * SIZE, "of a as much as of b"
    assert queue.ahead("c", SIZE) == SIZE + 2 * SIZE
    assert take_all(queue, 2) == [("a", [1, 2]), ("b", [1, 2]), ("a", [3, 4]), ("a", [5])]


def test_a_turn_serves_the_pages_that_another_request_reserved() -> None:
    queue = LoadQueue()
    one, two = request("1"), request("2")
    add(queue, one, [1, 2, 3, 4])
    add(queue, two, [5, 6])
    two.needs = "1"
    assert take_all(queue, 1)[:4] == [("1", [1]), ("1", [2]), ("1", [3]), ("1", [4])]


def test_pages_are_in_prefix_order_whenever_they_were_reserved() -> None:
    queue = LoadQueue()
    state = request("a")
    state.groups = frozenset({b"0", b"1"})
    late = add(queue, state, [7, 8])
    early = add(queue, state, [4, 5])
    add(queue, state, [4, 8], group=1)
    ends = []
    while queue:
        _, entries, timing = queue.take(9)
        ends += [(entry.end_token, entry.key[-1]) for entry in entries]
        assert timing is not late or {entry.end_token for entry in entries} <= {7, 8}
        assert timing is not early or {entry.end_token for entry in entries} <= {4, 5}
    assert ends == [(4, 0), (4, 1), (5, 0), (7, 0), (8, 0), (8, 1)]


def test_dropping() -> None:
    queue = LoadQueue()
    one, two = request("1"), request("2")
    timing = add(queue, one, [1, 2, 3])
    add(queue, two, [1, 2])
    dropped = queue.drop_pages(lambda state, entry: state is one and entry.end_token > 1)
    assert [(state.view.req_id, entry.end_token) for state, entry in dropped] == [
        ("1", 2),
        ("1", 3),
    ]
    assert (timing.pages, timing.ahead) == (1, SIZE)
    assert queue.ahead("3", 10 * SIZE) == 13 * SIZE
    assert len(queue.drop(lambda state: state is two)) == 2
    assert take_all(queue, 9) == [("1", [1])]
    assert queue.drop(lambda state: True) == []
