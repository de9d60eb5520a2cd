"""Checkpoints for the engine tests, built once per checkout."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.driver import ROOT, region_files
from tests.models import tiny_deepseek_v2, tiny_gemma3, tiny_llama

CHECKPOINTS = ROOT / ".cache" / "test-models"


@pytest.fixture(scope="session")
def llama() -> Path:
    """Tiny Llama with 4 KV heads."""
    return tiny_llama(CHECKPOINTS, kv_heads=4)


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Tiny Gemma-3: sliding-window and full attention groups."""
    return tiny_gemma3(CHECKPOINTS)


@pytest.fixture(scope="session")
def deepseek() -> Path:
    """Tiny DeepSeek-V2: MLA."""
    return tiny_deepseek_v2(CHECKPOINTS)


@pytest.fixture(autouse=True)
def nothing_left_in_shm() -> Iterator[None]:
    """No engine leaves a page region behind."""
    before = region_files()
    yield
    assert region_files() == before
