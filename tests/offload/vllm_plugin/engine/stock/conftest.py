from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.offload.vllm_plugin.block_engine import Model
from tests.offload.vllm_plugin.engine.stock.stock_world import (
    StartEngine,
    StockEngine,
    StockWorld,
)
from tests.tiers.object.conftest import directory as directory
from tests.tiers.valkey.conftest import server as server
from tests.tiers.valkey.conftest import shared_server as shared_server


@pytest.fixture(scope="package")
def model() -> Model:
    """With full attention alone."""
    return Model("full", 56)


@pytest.fixture
def start(model: Model) -> Iterator[StartEngine]:
    """Starts engines with one tier of ours, and ends them; their CPU tier holds 24 chunks."""
    made: list[StockEngine] = []

    def start_one(tier: dict[str, Any], slots: int = 24, **options: Any) -> StockEngine:
        made.append(StockEngine(options.pop("model", model), tier, slots, **options))
        return made[-1]

    yield start_one
    for engine in made:
        engine.close()


@pytest.fixture
def world(model: Model) -> Iterator[Callable[..., StockWorld]]:
    """Makes managers with one tier of ours, and ends them."""
    made: list[StockWorld] = []

    def make(tier: dict[str, Any], **options: Any) -> StockWorld:
        made.append(StockWorld(options.pop("model", model), tier, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()
