"""The same random traces with stock vLLM's CPU manager and with ours, under vLLM's scheduler.

Every block that a request reads without having computed it is compared with what was computed for
its tokens (`BlockEngine`). The tiers have too little room. The GPU's prefix cache is emptied
between rounds: then what is loaded says how much of their prefixes the manager kept.

No order of eviction is better than another on every trace: with other seeds about one trace in a
hundred loads a percent less with ours. In those looked into, stock had made room by taking pages
out of the middle of a prefix in use, and an older prompt that stayed for it was asked for next.
From 0.33 on stock orders by request too.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from vllm import version  # noqa: E402
from vllm.v1.kv_offload.base import OffloadingManager  # noqa: E402
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager  # noqa: E402

from kvstrata.offload.config.offload_config import OffloadConfig  # noqa: E402
from kvstrata.offload.manager import TieringManager  # noqa: E402
from kvstrata.offload.primary.region import Region  # noqa: E402
from kvstrata.offload.vllm_plugin.scheduler import KVStrataScheduler  # noqa: E402
from kvstrata.tiers.base import PageLayout, TensorSpec  # noqa: E402
from tests.offload.vllm_plugin.block_engine import (  # noqa: E402
    BLOCK,
    KINDS,
    BlockEngine,
    Model,
    Prompt,
)
from tests.offload.vllm_plugin.traces import trace  # noqa: E402

TRACES = 40
STOCK, OURS = ("stock lru", "stock arc"), ("lru", "arc", "auto")
PAGE_BYTES = 16  # nobody moves them
Loaded = dict[str, int]  # blocks by manager


class NoRegion:
    """In place of the shared memory: the engine's rows are filled completely, and at once."""

    def set_incomplete(self, slot: int, incomplete: bool) -> None:
        pass

    def close(self) -> None:
        pass


def make(name: str, model: Model, slots: int, threshold: int) -> OffloadingManager:
    """A manager without secondary tiers: ours with a policy, or stock's."""
    stock, _, policy = name.rpartition(" ")
    if stock:
        return CPUOffloadingManager(slots, policy, store_threshold=threshold)
    manager = TieringManager(
        OffloadConfig(
            cpu_bytes=slots * PAGE_BYTES, eviction_policy=policy, store_threshold=threshold
        ),
        slots,
        dict.fromkeys(
            range(len(model.specs)), PageLayout((TensorSpec("kv", "U8", (PAGE_BYTES,)),), BLOCK)
        ),
        lambda slot, nbytes: memoryview(bytes(nbytes)),
        lambda slot: True,
        lambda deadline_s, clock: [],
        weights_fixed=True,
        windows=model.windows,
    )
    return KVStrataScheduler(manager, cast(Region, NoRegion()), events=False)


@pytest.fixture(scope="module")
def models() -> Iterator[dict[tuple[str, int], Model]]:
    """By kind and blocks; made when they are needed."""

    class Models(dict[tuple[str, int], Model]):
        def __missing__(self, key: tuple[str, int]) -> Model:
            self[key] = Model(*key)
            return self[key]

    yield Models()


@pytest.fixture(scope="module")
def loaded(models: Any) -> list[tuple[str, Loaded]]:
    """Of each trace the kind of model, and what each manager loaded."""
    rows = []
    for seed in range(TRACES):
        kind = list(KINDS)[seed % len(KINDS)]
        model = models[kind, 56 * len(KINDS[kind])]
        threshold = (0, 0, 2)[seed // len(KINDS) % 3]
        # with a threshold less is stored
        slots = (24, 36, 48, 60)[seed % 4] * len(model.specs) // (2 if threshold else 1)
        rounds = trace(seed)
        row = {}
        for name in STOCK + OURS:
            engine = BlockEngine(model, make(name, model, slots, threshold), slots)
            play(engine, rounds, reset=True)
            row[name] = engine.loaded
        rows.append((kind, row))
    return rows


def play(engine: BlockEngine, rounds: Sequence[Sequence[Prompt]], *, reset: bool) -> None:
    """Serve a trace; the GPU forgets all after each round, or keeps what it has room for."""
    for prompts in rounds:
        engine.run(prompts)
        if reset:
            engine.reset()
    engine.close()


def total(rows: Sequence[tuple[str, Loaded]]) -> Loaded:
    """What each manager loaded in all."""
    sums: Counter[str] = Counter()
    for _, row in rows:
        sums.update(row)
    return dict(sums)


def test_lru_is_never_below_stocks(loaded: list[tuple[str, Loaded]]) -> None:
    """In 40 of 40 traces with vLLM 0.32; in 38 with 0.33, and by little."""
    below = {seed: row for seed, (_, row) in enumerate(loaded) if row["lru"] < row["stock lru"]}
    assert len(loaded) == TRACES
    assert len(below) <= (0 if version.__version__.startswith("0.32.") else 2), below
    assert all(row["lru"] >= 0.95 * row["stock lru"] for row in below.values()), below


@pytest.mark.parametrize("kind", KINDS)
def test_lru_keeps_no_less_of_any_kind(kind: str, loaded: list[tuple[str, Loaded]]) -> None:
    """Measured: 4 to 10 % more with vLLM 0.32, 1 to 2 % with 0.33."""
    sums = total([row for row in loaded if row[0] == kind])
    assert sums["lru"] >= sums["stock lru"] > 0


@pytest.mark.parametrize("policy", ["arc", "auto"])
def test_other_policies_against_stocks_better_one(
    policy: str, loaded: list[tuple[str, Loaded]]
) -> None:
    sums = total(loaded)
    assert sums[policy] >= 0.99 * max(sums[name] for name in STOCK), sums


def test_with_hits_in_a_small_gpu(models: Any) -> None:
    """Requests are preempted, and find a beginning in GPU memory, which needs no load."""
    found: Counter[str] = Counter()
    preempted = 0
    for seed in range(8):
        model = models["full", 30]
        rounds = trace(seed)
        for name in ("stock lru", *OURS):
            slots = (30, 48, 64)[seed % 3]
            engine = BlockEngine(model, make(name, model, slots, 0), slots)
            play(engine, rounds, reset=False)
            found[name] += engine.found
            preempted += engine.preempted
    assert preempted
    assert min(found[name] for name in OURS) >= 0.99 * found["stock lru"], found
