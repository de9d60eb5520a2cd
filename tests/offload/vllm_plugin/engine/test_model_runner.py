"""vLLM's second model runner overwrites blocks before their stores are flushed."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

import torch  # noqa: E402
from vllm.v1.kv_cache_interface import (  # noqa: E402
    KVQuantMode,
    MambaSpec,
)

from kvstrata.kernels.opening import open_pipeline  # noqa: E402
from kvstrata.offload.vllm_plugin.engine import model_runner  # noqa: E402
from kvstrata.offload.vllm_plugin.engine.model_runner import overwrites_before_flush  # noqa: E402
from kvstrata.offload.vllm_plugin.worker import KVStrataWorker  # noqa: E402
from tests.offload.vllm_plugin.modelless_engine import Layer, ModellessEngine, SlowStores  # noqa: E402
from tests.offload.vllm_plugin.test_other_kinds_of_cache import Start, full, text, window  # noqa: E402

MIXED = {
    "full": (full(), "FLASH_ATTN"),
    "window": (window(dtype=torch.bfloat16), "FLASH_ATTN"),
}
BLOCKS = 24  # one prompt takes 20 of them, so that the next one takes blocks of the last


def incomplete_pages(engine: ModellessEngine) -> int:
    return int(engine.manager.counters["incomplete_pages"])


def serve(engine: ModellessEngine) -> list[int]:
    """Two prompts, of which the second takes the first one's blocks at once; then both again, from
    the CPU tier. Tokens that were found."""
    one, two = text(1), text(2)
    assert engine.run_all([one, two]) == [0, 0]
    found = []
    for prompt in (one, two):
        engine.reset()
        found.append(engine.run(prompt))  # compares every byte
    return found


PIPELINES = pytest.mark.parametrize("pipeline", [open_pipeline, SlowStores])


@PIPELINES
def test_blocks_that_were_given_away_are_not_stored(start: Start, pipeline: Any) -> None:
    engine = start(MIXED, blocks=BLOCKS, max_num_seqs=1, runner_v2=True, pipeline=pipeline)
    assert serve(engine) == [0, 288]
    assert incomplete_pages(engine) > 0


@PIPELINES
def test_the_fault_is_there(start: Start, pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the marks, the engine of this test serves zeroes."""
    monkeypatch.setattr(KVStrataWorker, "wait", lambda worker, jobs: worker._pipeline.fence(jobs))
    engine = start(MIXED, blocks=BLOCKS, max_num_seqs=1, runner_v2=True, pipeline=pipeline)
    with pytest.raises(AssertionError, match=r"token \d+ is wrong"):
        serve(engine)


@pytest.mark.parametrize(
    ("runner_v2", "layers"),
    [(False, MIXED), (True, {"full": (full(), "FLASH_ATTN"), "window": (window(), "FLASH_ATTN")})],
    ids=["the first runner", "nothing to zero"],
)
def test_nothing_is_lost_elsewhere(runner_v2: bool, layers: dict[str, Any], start: Start) -> None:
    options = {"runner_v2": runner_v2, "pipeline": SlowStores}
    engine = start(layers, blocks=BLOCKS, max_num_seqs=1, **options)
    assert serve(engine) == [288, 288]
    assert incomplete_pages(engine) == 0


def test_blocks_that_were_kept_are_stored(start: Start) -> None:
    engine = start(MIXED, blocks=60, runner_v2=True)
    assert serve(engine) == [288, 288]
    assert incomplete_pages(engine) == 0


FP8 = full(dtype=torch.uint8, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR)
MAMBA = MambaSpec(block_size=32, shapes=((8,),), dtypes=(torch.float32,), mamba_cache_mode="align")


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        ([], False),
        ([full(), full()], False),
        ([full(), None], False),
        ([full(), window()], False),
        ([full(), FP8], True),
        ([full(), window(dtype=torch.float32)], True),
        ([MAMBA], True),
        ([full(), MAMBA], True),
    ],
)
@pytest.mark.parametrize("runner_v2", [False, True])
def test_where_it_can_happen(
    specs: list[Any], expected: bool, runner_v2: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = {str(number): Layer(spec, "FLASH_ATTN") for number, spec in enumerate(specs)}
    monkeypatch.setattr(model_runner, "get_layers_from_vllm_config", lambda *_: layers)
    config: Any = SimpleNamespace(use_v2_model_runner=runner_v2)
    assert overwrites_before_flush(config) == (expected and runner_v2)
