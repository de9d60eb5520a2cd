"""What the modelled scheduler makes of time: queues, loads, and what is stored in vain."""

import pytest

from kvstrata.offload.simulate.generate import MOONCAKE, Chats, generate
from kvstrata.offload.simulate.results import Result, simulate
from kvstrata.offload.simulate.scheduler import Scheduler
from kvstrata.offload.simulate.setup import Engine, Speeds, build, parse_setup
from kvstrata.offload.simulate.traces import Request, Trace, parse_trace
from kvstrata.tiers.options import ConfigError

TOKENS, PAGE = 100, 1 << 20
SPEEDS = Speeds(prefill=1000.0, decode=10.0, gpu=100.0 * PAGE, read=10.0 * PAGE, write=1e18)
CPU = {"cpu_bytes_to_use": "50MiB", "eviction_policy": "lru"}
FS = {**CPU, "secondary_tiers": [{"type": "fs"}]}
SMALL = {**FS, "cpu_bytes_to_use": "40MiB"}
# One that fills it between two that are alike
IN_BETWEEN = 40


def prompt(at: float, name: int, chunks: int, generated: int = 1) -> Request:
    keys = [bytes([name, *range(place + 1)]) + bytes(4) for place in range(chunks)]
    return Request(at, TOKENS * chunks, generated, keys)


def ttft(config: dict[str, object], *requests: Request, **more: object) -> list[float]:
    engine = Engine(TOKENS, PAGE, speeds=SPEEDS, **more)  # type: ignore[arg-type]
    scheduler = Scheduler(build(parse_setup(config), engine), engine, step_tokens=1000)
    scheduler.run(requests)
    return [round(seconds, 3) for seconds in scheduler.counts.ttft]


def replay(config: dict[str, object], *requests: Request, **more: object) -> Result:
    engine = Engine(TOKENS, PAGE, speeds=SPEEDS, **more)  # type: ignore[arg-type]
    return simulate(Trace(requests, TOKENS), parse_setup(config), engine)


def test_a_prompt_takes_as_long_as_it_is_computed() -> None:
    assert ttft(CPU, prompt(0.0, 1, 10)) == [1.0]


def test_prompts_wait_for_each_other() -> None:
    asked = [prompt(0.0, 1, 100), prompt(0.1, 2, 100), prompt(50.0, 3, 10)]
    assert ttft(CPU, *asked) == [10.0, 19.9, 1.0]


def test_two_servers_compute_two_prompts_at_once() -> None:
    asked = [prompt(0.0, 1, 100), prompt(0.0, 2, 100)]
    assert ttft(CPU, *asked, servers=2) == [10.0, 10.0]


def test_what_was_generated_is_in_gpu_memory() -> None:
    whole = prompt(100.0, 1, 5)
    first = Request(0.0, 3 * TOKENS, TOKENS + 1, whole.keys[:3], whole.keys[3:4])
    found = replay(CPU, first, whole, gpu_bytes=8 * PAGE)
    assert found.served == {"gpu": 4 * TOKENS, "cpu": 0}


def test_what_is_in_the_cpu_tier_is_copied() -> None:
    first, second = ttft(CPU, prompt(0.0, 1, 10), prompt(100.0, 1, 10))
    # ten pages at a hundred a second, and the last token
    assert (first, second) == (1.0, 0.101)


def test_what_is_on_the_disk_is_loaded_first() -> None:
    asked = [prompt(0.0, 1, 10), prompt(100.0, 2, IN_BETWEEN), prompt(200.0, 1, 10)]
    *_, third = ttft(SMALL, *asked)
    # ten pages at ten a second, the copy, the last token, and what a job takes
    assert 1.1 <= third < 1.3
    result = replay(SMALL, *asked)
    assert result.served == {"cpu": 0, "fs": 1000}
    assert result.moved["fs-cpu"] == result.moved["cpu-gpu"] == 10 * PAGE
    # a quarter of the tier is kept free of pages on their way out
    assert result.moved["cpu-fs"] == (10 + 30) * PAGE
    assert result.evicted == {"cpu": 20, "fs": 0}
    assert result.hit_rate == pytest.approx(1 / 6)
    assert result.written_per_day == pytest.approx(40 * PAGE / result.seconds * 86400)


def test_what_is_in_gpu_memory_costs_nothing() -> None:
    result = replay(CPU, prompt(0.0, 1, 10), prompt(100.0, 1, 10), gpu_bytes=20 * PAGE)
    # vLLM computes the last chunk: of a whole prompt one token is needed
    assert result.served == {"gpu": 900, "cpu": 100}


def test_the_gpu_forgets_the_least_recently_used() -> None:
    asked = [prompt(0.0, 1, 10), prompt(100.0, 2, 15), prompt(200.0, 1, 10)]
    result = replay(CPU, *asked, gpu_bytes=20 * PAGE)
    assert result.served == {"gpu": 500, "cpu": 500}


def test_what_is_being_stored_is_waited_for() -> None:
    """Until the first prompt is computed and stored, and then its pages are copied back."""
    first, second = ttft(CPU, prompt(0.0, 1, 10), prompt(0.5, 1, 10))
    assert (first, second) == (1.0, 0.601)


def test_requests_go_on_while_others_load() -> None:
    before = [prompt(0.0, 1, 10), prompt(100.0, 2, IN_BETWEEN)]
    # they end their prefill in this order
    *_, behind, loads = ttft(SMALL, *before, prompt(200.0, 1, 10), prompt(200.0, 3, 2))
    assert behind == 0.2 < loads


def test_load_or_recompute_is_the_real_ones() -> None:
    """A disk that is slower than computing is left alone once that is known."""
    speeds = Speeds(prefill=10_000.0, read=20.0 * PAGE, write=1e18)
    asked = [prompt(100.0 * at, at % 8, 60) for at in range(120)]
    found = []
    for weighs in (False, True):
        config = {**FS, "cpu_bytes_to_use": "64MiB", "load_or_recompute": weighs}
        engine = Engine(TOKENS, PAGE, speeds=speeds)
        scheduler = Scheduler(build(parse_setup(config), engine), engine, step_tokens=1000)
        scheduler.run(asked)
        found.append(sum(scheduler.counts.ttft[60:]))
    assert found[1] < 0.5 * found[0]


def test_every_request_is_served_whatever_the_tiers() -> None:
    trace = parse_trace("t", generate(MOONCAKE, Chats(chats=40)))
    rates = []
    for config in (CPU, SMALL, {**FS, "store_threshold": 2}, {**FS, "offload_prompt_only": True}):
        engine = Engine(512, PAGE, speeds=Speeds(prefill=5000.0, read=PAGE, write=PAGE))
        scheduler = Scheduler(world := build(parse_setup(config), engine), engine)
        scheduler.run(trace.requests)
        assert len(scheduler.counts.ttft) == len(trace.requests)
        counters = world.manager.counters
        hits = counters["primary_hits"] + counters["promoted_hits:fs"]
        assert hits == scheduler.counts.loaded == counters["loaded_pages"]
        assert not world.manager.serving and not world.manager.has_pending_work()
        rates.append(hits)
    assert all(rates)


def test_a_tier_that_holds_no_page_is_refused() -> None:
    setup = parse_setup({"cpu_bytes_to_use": "1MiB"})
    with pytest.raises(ConfigError, match=r"cpu_bytes_to_use: 1\.0 MiB is less than one page"):
        build(setup, Engine(512, 64 << 20))


@pytest.mark.parametrize("tiers", [[{"type": "memory"}], [{"type": "fs"}, {"type": "fs"}], [{}]])
def test_tiers_that_are_not_simulated_are_refused(tiers: list[dict[str, str]]) -> None:
    with pytest.raises(ConfigError, match=r"secondary_tiers: .* one tier of type fs, or none"):
        parse_setup({"cpu_bytes_to_use": "1GiB", "secondary_tiers": tiers})
