"""What the workers of an engine tell each other at registration.

Every rank is a thread; the collective of torch is replaced by one between threads.
"""

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from kvstrata.offload.vllm_plugin import registration  # noqa: E402
from kvstrata.offload.vllm_plugin.registration import Ranks, RegistrationError  # noqa: E402

TIMEOUT_SECONDS = 30.0  # only a rank that leaves out a collective meets it


@pytest.fixture
def on_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Run `body(ranks, world rank)` on each rank of a world; results or errors, in order."""

    def run(engine_ids: Sequence[str], body: Callable[[Ranks, int], Any]) -> list[Any]:
        size = len(engine_ids)
        barrier = threading.Barrier(size, timeout=TIMEOUT_SECONDS)
        board: list[Any] = [None] * size
        mine = threading.local()
        world = SimpleNamespace(cpu_group=object(), world_size=size)

        def all_gather_object(values: list[Any], value: Any, group: Any) -> None:
            assert group is world.cpu_group
            board[mine.rank] = value
            barrier.wait()
            values[:] = board
            barrier.wait()

        monkeypatch.setattr(registration, "get_world_group", lambda: world)
        monkeypatch.setattr(registration.dist, "all_gather_object", all_gather_object)
        results: list[Any] = [None] * size

        def one(rank: int) -> None:
            mine.rank = rank
            try:
                results[rank] = body(Ranks(engine_ids[rank]), rank)
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    return run


def test_gather_is_in_the_order_of_ranks(on_ranks: Callable[..., list[Any]]) -> None:
    found = on_ranks(["e"] * 3, lambda ranks, rank: ranks.gather(rank * 10))
    assert found == [[0, 10, 20]] * 3


def test_gather_leaves_out_other_engines(on_ranks: Callable[..., list[Any]]) -> None:
    """Data-parallel replicas of a node share vLLM's world group."""
    found = on_ranks(["e_dp0", "e_dp0", "e_dp1", "e_dp1"], lambda ranks, rank: ranks.gather(rank))
    assert found == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_agreement_gives_each_rank_its_own_result(on_ranks: Callable[..., list[Any]]) -> None:
    found = on_ranks(["e"] * 3, lambda ranks, rank: ranks.agree(lambda: rank or None))
    assert found == [None, 1, 2]


def fail(message: str) -> Any:
    raise ValueError(message)


def test_one_failure_is_the_failure_of_all(on_ranks: Callable[..., list[Any]]) -> None:
    def body(ranks: Ranks, rank: int) -> Any:
        return ranks.agree(lambda: fail(f"bad cache {rank}") if rank in (0, 2) else rank)

    found = on_ranks(["e"] * 3, body)
    assert all(isinstance(error, RegistrationError) for error in found)
    assert {str(error) for error in found} == {
        "kvstrata cannot offload this KV cache: worker 0: bad cache 0; worker 2: bad cache 2"
    }


def test_an_error_without_words_is_one(on_ranks: Callable[..., list[Any]]) -> None:
    found = on_ranks(
        ["e"] * 2, lambda ranks, rank: ranks.agree(lambda: fail("") if rank == 1 else rank)
    )
    assert [str(error) for error in found] == [
        "kvstrata cannot offload this KV cache: worker 1: ValueError"
    ] * 2


def test_other_engines_go_on(on_ranks: Callable[..., list[Any]]) -> None:
    """Workers are numbered inside their engine."""

    def body(ranks: Ranks, rank: int) -> Any:
        return ranks.agree(lambda: fail("no room") if rank == 3 else rank)

    found = on_ranks(["a", "a", "b", "b"], body)
    assert found[:2] == [0, 1]
    assert [str(error) for error in found[2:]] == [
        "kvstrata cannot offload this KV cache: worker 1: no room"
    ] * 2
