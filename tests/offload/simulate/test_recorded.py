"""What vLLM's scheduler served, recorded and replayed, is found alike by the simulator."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from kvstrata.offload.metering.recording import Recording  # noqa: E402
from kvstrata.offload.metering.recording_file import RecordingFile  # noqa: E402
from kvstrata.offload.primary.region import Region  # noqa: E402
from kvstrata.offload.simulate.gpu_cache import GpuCache  # noqa: E402
from kvstrata.offload.simulate.scheduler import Scheduler  # noqa: E402
from kvstrata.offload.simulate.setup import Setup, World, build  # noqa: E402
from kvstrata.offload.simulate.traces import Request, Trace, read_trace  # noqa: E402
from kvstrata.offload.vllm_plugin.engine.recorder import Recorder  # noqa: E402
from kvstrata.offload.vllm_plugin.scheduler import KVStrataScheduler  # noqa: E402
from tests.offload.simulate.test_agreement import (  # noqa: E402
    ENGINE,
    GPU_BLOCKS,
    LRU,
    PAGE,
    Steps,
    found,
    moves,
    rounds,
    setup_of,
)
from tests.offload.vllm_plugin.block_engine import (  # noqa: E402
    BLOCK,
    TOKEN,
    BlockEngine,
    Model,
    Prompt,
)
from tests.offload.vllm_plugin.test_against_stock import NoRegion, play  # noqa: E402


class RecordedSteps(Steps):
    """With a recording."""

    def __init__(self, world: World, path: Path) -> None:
        super().__init__(world)
        file = RecordingFile(str(path))
        recording = Recording(file, group=0, tokens=BLOCK, nbytes=PAGE, model="m")
        self._inner = KVStrataScheduler(
            *(world.manager, cast(Region, NoRegion())), events=False, recorder=Recorder(recording)
        )


def serve(setup: Setup, asked: Sequence[Prompt], path: Path) -> dict[str, int]:
    """What vLLM finds, one request after the other; the GPU forgets all after each."""
    world, slots = build(setup, ENGINE), setup.slots(ENGINE)
    memory = np.zeros((slots, BLOCK), np.int64)
    assert world.disk is not None
    moves(world.disk, memory)
    engine = BlockEngine(
        Model("full", GPU_BLOCKS), cast(Any, RecordedSteps(world, path)), slots, memory
    )
    play(engine, [[prompt] for prompt in asked], reset=True)
    return found(world)


def replay(setup: Setup, requests: Sequence[Request]) -> dict[str, int]:
    """The same of the recording."""
    world = build(setup, ENGINE)
    scheduler = Scheduler(world, ENGINE, step_tokens=4 * BLOCK)
    for request in requests:
        request.at = world.clock.now
        scheduler.run([request])
        scheduler.gpu = GpuCache(GPU_BLOCKS)
    return found(world)


@pytest.fixture(scope="module")
def setup() -> Setup:
    return setup_of(LRU)


def test_the_replay_of_a_recording_finds_the_same(setup: Setup, tmp_path: Path) -> None:
    asked = [prompt for (prompt,) in rounds(0, together=False)]
    served = serve(setup, asked, tmp_path / "requests")
    trace: Trace = read_trace(str(tmp_path / "requests"))
    assert [each.tokens for each in trace.requests] == [len(each.tokens) for each in asked]
    assert {each.generated for each in trace.requests} == {1}
    assert replay(setup, trace.requests) == served
    assert served["primary_hits"] and served["promoted_hits:fs"] and served["evicted_pages"]


def test_what_the_gpu_had_and_what_was_generated(setup: Setup, tmp_path: Path) -> None:
    """A request that found all in GPU memory is recorded like any other."""
    path = tmp_path / "requests"
    prompt = Prompt(list(range(2 * BLOCK + 1)), generate=BLOCK)
    goes_on = Prompt([*prompt.tokens, *[TOKEN] * BLOCK, 3], generate=1)
    world = build(setup, ENGINE)
    engine = BlockEngine(
        Model("full", GPU_BLOCKS), cast(Any, RecordedSteps(world, path)), setup.slots(ENGINE)
    )
    play(engine, [[prompt, Prompt([7], generate=3)], [prompt], [goes_on]], reset=False)
    first, short, second, third = requests = read_trace(str(path)).requests
    assert (first.tokens, first.generated) == (2 * BLOCK + 1, BLOCK)
    assert (len(first.keys), len(first.behind)) == (2, 1)
    assert (second.tokens, second.keys) == (first.tokens, first.keys)
    assert (short.tokens, short.generated, short.keys) == (1, 3, [])
    assert third.keys == first.keys + first.behind
    world = build(setup, ENGINE)
    scheduler = Scheduler(world, ENGINE)
    for request in requests:
        request.at = world.clock.now
        scheduler.run([request])
    assert scheduler.counts.gpu_tokens // BLOCK == engine.found == 2 + 3
