"""The environment of every test, set before a test module imports triton or vLLM."""

import os

import pytest
from hypothesis import settings

try:
    import torch

    HAS_CUDA = torch.cuda.is_available()
except ImportError:
    HAS_CUDA = False

if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

# Timing never decides a test. In CI the same examples run every time.
settings.register_profile(
    "kvstrata", deadline=None, max_examples=50, derandomize="CI" in os.environ
)
settings.load_profile("kvstrata")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is no CUDA device."""
    if HAS_CUDA:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
