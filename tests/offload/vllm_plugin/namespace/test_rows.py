"""The namespace of rows: whatever may change a row's bytes is in it."""

import copy
import json
import os
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

import vllm  # noqa: E402
from vllm.config import VllmConfig  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import (  # noqa: E402
    build_offloading_config,
)
from vllm.v1.kv_offload.config import OffloadingConfig  # noqa: E402

from kvstrata.offload.vllm_plugin.namespace.rows import row_fields, row_layouts  # noqa: E402
from kvstrata.tiers.base import layouts_from_json  # noqa: E402
from tests.offload.vllm_plugin.block_engine import BLOCK, Model  # noqa: E402

WEIGHTS = {"weights": "w", "draft_weights": None}
ROW_BYTES = 4096


@pytest.fixture(scope="module")
def model() -> Model:
    return Model("window", 56)


@pytest.fixture(scope="module")
def config(model: Model) -> OffloadingConfig:
    return build_offloading_config(model.config, model.kv)


def fields(config: OffloadingConfig, vllm_config: VllmConfig, row: int = ROW_BYTES) -> Any:
    return row_fields(config, vllm_config, row_layouts(config, row), WEIGHTS)


def test_they_are_json_and_repeat(config: OffloadingConfig, model: Model) -> None:
    found = fields(config, model.config)
    assert json.loads(json.dumps(found)) == found == fields(config, model.config)
    layouts = layouts_from_json(found["pages"])
    assert {group: layout.nbytes for group, layout in layouts.items()} == {0: 4096, 1: 4096}
    assert {layout.tokens for layout in layouts.values()} == {BLOCK}
    assert found["weights"] == "w" and found["configuration"]["model_config"]


def test_no_canonical_page_is_of_it(config: OffloadingConfig, model: Model) -> None:
    """Those have no field `rows`, whatever else is equal."""
    assert fields(config, model.config)["rows"]["vllm"] == vllm.__version__


def test_what_changes_a_rows_bytes_counts(
    config: OffloadingConfig, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = [fields(config, model.config), fields(config, model.config, row=8192)]
    parallel = config.parallel
    for changed in (
        replace(config, kv_cache_layout="LBNHC"),
        replace(config, canonical_layout=True),
        replace(config, replicated_layout=True),
        replace(config, worker_kv_bytes_per_block=1),
        replace(config, cache=replace(config.cache, blocks_per_chunk=2)),
        replace(config, cache=replace(config.cache, tokens_per_hash=8)),
        replace(config, model=replace(config.model, dtype="fp8")),
        replace(config, parallel=replace(parallel, tp_size=2, world_size=2)),
        replace(config, parallel=replace(parallel, pp_size=2, world_size=2)),
        replace(config, parallel=replace(parallel, world_size=2)),
        replace(config, groups=(replace(config.groups[0], layer_names=("x",)), config.groups[1])),
    ):
        seen.append(fields(changed, model.config))
    other = copy.copy(model.config)
    other.attention_config = copy.copy(other.attention_config)
    other.attention_config.flash_attn_version = 3
    seen.append(fields(config, other))
    monkeypatch.setenv("VLLM_ROCM_USE_AITER_MHA", "0")
    seen.append(fields(config, model.config))
    monkeypatch.delenv("VLLM_ROCM_USE_AITER_MHA")
    monkeypatch.setattr(vllm, "__version__", "0.32.99")
    seen.append(fields(config, model.config))
    monkeypatch.undo()
    monkeypatch.setitem(os.environ, "PYTHONHASHSEED", "77")
    seen.append(fields(config, model.config))
    texts = [json.dumps(each, sort_keys=True) for each in seen]
    assert len(set(texts)) == len(texts)
