"""vLLM's own filesystem tier behind vLLM's scheduler and connector, with our manager between."""

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from tests.offload.vllm_plugin.foreign_tiers.region_world import FS  # noqa: E402
from tests.offload.vllm_plugin.modelless_engine import ModellessEngine  # noqa: E402
from tests.offload.vllm_plugin.test_other_kinds_of_cache import full, text  # noqa: E402


def test_what_one_engine_stored_another_finds(
    start: Callable[..., ModellessEngine], tmp_path: Path
) -> None:
    extra = {"secondary_tiers": [{**FS, "root_dir": str(tmp_path)}]}
    layers = {"l": (full(2), "FLASH_ATTN")}
    one = start(layers, tp=2, extra=extra)
    assert one.run(text(1)) == 0
    (files,) = [each for each in tmp_path.iterdir() if each.name.endswith("_r0")]
    assert len(list(files.rglob("*.bin"))) == 10
    two = start(layers, tp=2, extra=extra)
    assert two.run(text(1)) >= 288  # the same bytes, which it compares
    assert two.manager.counters["promoted_pages:FileSystemTierManager"] == 10
    assert two.run(text(2)) == 0
