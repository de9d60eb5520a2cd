"""Checkpoints for the engine tests, built once per checkout."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.driver import ROOT, region_files
from tests.models import tiny_deepseek_v2, tiny_gemma3, tiny_llama

# Three engines side by side with 64 MiB each, and what vLLM's workers tell each other.
SHM_BYTES = 512 << 20
CHECKPOINTS = ROOT / ".cache" / "test-models"


@pytest.fixture(scope="session", autouse=True)
def room_in_shm() -> None:
    """Containers have 64 MiB by default, which is too little for vLLM's own workers, too."""
    free = shutil.disk_usage("/dev/shm").free
    if free < SHM_BYTES:
        pytest.skip(
            f"/dev/shm has {free >> 20} MiB free, engines need {SHM_BYTES >> 20}: "
            "make it larger (containers: --shm-size)"
        )


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
