"""What several files of this folder need."""

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def own_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    """`register`, which vLLM calls in every engine, changes where our log lines go."""
    monkeypatch.setattr(logging.getLogger("kvstrata"), "parent", logging.getLogger())


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Starts engines without a model, and closes them at the end."""
    from tests.engine.conftest import CHECKPOINTS
    from tests.models import tiny_llama
    from tests.offload.vllm_plugin.modelless_engine import ModellessEngine

    engines = []
    before = dict(os.environ)

    def make(layers: Any, **options: Any) -> ModellessEngine:
        model = tiny_llama(CHECKPOINTS, kv_heads=options.pop("model_heads", 4))
        engines.append(ModellessEngine(model, layers, monkeypatch, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
    os.environ.clear()  # vLLM's CPU platform sets variables for the workers it would start
    os.environ.update(before)
