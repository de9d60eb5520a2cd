"""S3-FIFO as its paper says, and the optimum, which nothing exceeds."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from itertools import takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstrata.offload.primary.eviction.order import Use
from kvstrata.offload.simulate.generate import MOONCAKE, Chats, generate
from kvstrata.offload.simulate.optimum import most_found
from kvstrata.offload.simulate.results import optimum, simulate
from kvstrata.offload.simulate.s3_fifo import NAME, S3Fifo
from kvstrata.offload.simulate.setup import Engine, parse_setup
from kvstrata.offload.simulate.traces import Request, parse_trace
from tests.offload.primary.eviction.test_policies import PolicyMachine

PAGE = 1 << 20


def request(*path: int) -> Request:
    """A request whose chunks are the prefixes of a path, as in a tree."""
    keys = [bytes(path[: depth + 1]) for depth in range(len(path))]
    return Request(0.0, 512 * len(keys) + 1, 1, keys)


def best(requests: Sequence[Request], pages: int) -> int:
    """What can be found at most, by trying everything."""

    @cache
    def after(number: int, held: frozenset[bytes]) -> int:
        if number == len(requests):
            return 0
        keys = requests[number].keys
        found = next((at for at, key in enumerate(keys) if key not in held), len(keys))
        return found + max(after(number + 1, kept) for kept in choices(held | set(keys)))

    def choices(there: frozenset[bytes]) -> list[frozenset[bytes]]:
        kept = [frozenset[bytes]()]
        for key in there:
            kept += [each | {key} for each in kept if len(each) < pages]
        return kept

    return after(0, frozenset())


PATHS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=3), min_size=1, max_size=6)


@given(PATHS, st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_the_optimum_is_what_trying_everything_finds(paths: list[list[int]], pages: int) -> None:
    requests = [request(*path) for path in paths]
    assert most_found(requests, pages) == best(requests, pages)


@pytest.mark.parametrize("policy", ["lru", "arc", "auto", NAME])
def test_no_policy_finds_more_than_the_optimum(policy: str) -> None:
    trace = parse_trace("t", generate(MOONCAKE, Chats(chats=60)))
    setup = parse_setup({"cpu_bytes_to_use": 60 * PAGE, "eviction_policy": policy})
    engine = Engine(512, PAGE)
    most = optimum(trace, setup, engine).hit_rate
    assert 0.0 < simulate(trace, setup, engine).hit_rate <= most < 1.0


@pytest.mark.parametrize("pages", [40, 120, 400, 4000])
def test_lru_finds_what_a_plain_replay_finds(pages: int) -> None:
    """Of requests that come one after the other: the end of a prefix leaves first."""
    trace = parse_trace("t", generate(MOONCAKE, Chats(chats=60)))
    held: OrderedDict[bytes, None] = OrderedDict()
    found = 0
    for number, asked in enumerate(trace.requests):
        found += sum(1 for _ in takewhile(held.__contains__, asked.keys))
        for key in reversed(asked.keys):
            held[key] = None
            held.move_to_end(key)
        while len(held) > pages:
            held.popitem(last=False)
        asked.at = 1000.0 * number
    setup = parse_setup({"cpu_bytes_to_use": pages * PAGE, "eviction_policy": "lru"})
    result = simulate(trace, setup, Engine(512, PAGE))
    assert result.served == {"cpu": 512 * found}


class Played:
    """S3-FIFO with ten pages: one in the small queue, nine in the main one."""

    def __init__(self) -> None:
        self.policy = S3Fifo(10, {})
        self.here: set[bytes] = set()

    def ask(self, key: bytes) -> None:
        use, pages = Use(), {key: 512}
        use.see(pages)
        self.policy.ask(pages, use)
        if key not in self.here:
            if len(self.here) == 10:
                gone = self.policy.evict(key, 512, use, must=True)
                assert gone is not None
                self.here.remove(gone)
            self.policy.insert(key, 512, use)
            self.policy.unpin(key)
            self.here.add(key)
        self.policy.ended(use)


def test_what_is_asked_for_once_passes_by() -> None:
    played = Played()
    for key in (b"a", b"b"):
        for _ in range(3):
            played.ask(key)
    for number in range(100):
        played.ask(b"once %d" % number)
    assert {b"a", b"b"} <= played.here


def test_what_comes_again_soon_goes_to_the_main_queue() -> None:
    played = Played()
    for number in range(11):
        played.ask(b"%d" % number)
    assert b"0" not in played.here
    played.ask(b"0")
    for number in range(20, 28):
        played.ask(b"%d" % number)
    assert b"0" in played.here


def test_of_one_request_the_last_leaves_first() -> None:
    policy, use = S3Fifo(4, {}), Use()
    pages = {b"%d" % at: 512 * at for at in range(1, 5)}
    use.see(pages)
    policy.ask(pages, use)
    for key, end in pages.items():
        policy.insert(key, end, use)
        policy.unpin(key)
    assert [policy.evict(b"new", 512, Use(), must=True) for _ in range(4)] == [*pages][::-1]
    assert policy.evict(b"new", 512, Use(), must=True) is None


class S3FifoMachine(PolicyMachine):
    name = NAME


TestS3FifoMachine = S3FifoMachine.TestCase
