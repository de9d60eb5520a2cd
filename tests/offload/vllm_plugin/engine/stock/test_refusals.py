"""What a user may get wrong, and engines that cannot have tiers of ours."""

import copy
import mmap
import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory  # noqa: E402

from kvstrata.offload.config.stock_entry import check_stock  # noqa: E402
from kvstrata.offload.vllm_plugin.engine.early_check import check  # noqa: E402
from kvstrata.offload.vllm_plugin.engine.errors import NamespaceError  # noqa: E402
from kvstrata.offload.vllm_plugin.engine.stock import seen  # noqa: E402
from kvstrata.offload.vllm_plugin.engine.stock.mapped_file import open_file_behind  # noqa: E402
from kvstrata.offload.vllm_plugin.engine.stock.whole_config import whole_config  # noqa: E402
from kvstrata.tiers.options import ConfigError  # noqa: E402
from kvstrata.tiers.registry import BUILT_IN, stock_names  # noqa: E402
from tests.offload.vllm_plugin.block_engine import Model  # noqa: E402
from tests.offload.vllm_plugin.engine.stock.stock_world import (  # noqa: E402
    StockWorld,
    changed,
    entry,
    open_manager,
)

FS = {"root_dir": "/nowhere/kv"}


def test_each_tier_has_a_name_there() -> None:
    assert set(stock_names().values()) >= set(BUILT_IN)
    for name in stock_names():
        made = SecondaryTierFactory.get_tier_class(entry(name))
        assert made.__name__ == name
        assert SecondaryTierFactory.get_tier_class(entry(name)) is made


@pytest.mark.parametrize(
    ("type_name", "options", "message"),
    [
        ("KVStrataFS", FS, "'KVStrataFS' is none of kvstrata's tiers .* KVStrataFs, "),
        ("KVStrataFs", {}, "KVStrataFs: root_dir is missing: give the directory"),
        ("KVStrataFs", {**FS, "max_byte": 1}, "unknown key 'max_byte' .did you mean 'max_bytes'"),
        ("KVStrataFs", {**FS, "weights_fixed": "yes"}, "KVStrataFs: weights_fixed: 'yes' is wrong"),
        ("KVStrataFs", {**FS, "lookup_deadline_s": 0}, "KVStrataFs: lookup_deadline_s: 0 "),
        ("KVStrataFs", {**FS, "fill": True}, 'KVStrataFs: "fill" has no meaning here'),
        ("KVStrataFs", {**FS, "load_only": True, "store_only": True}, "both are true"),
        ("KVStrataPool", {"name": "a/b", "max_bytes": 1}, "KVStrataPool: "),
    ],
)
def test_a_wrong_entry_is_said_before_the_model_is_loaded(
    type_name: str, options: dict[str, Any], message: str
) -> None:
    extra = {
        "spec_name": "TieringOffloadingSpec",
        "secondary_tiers": [{"type": "fs", "root_dir": 7}, {**entry(type_name), **options}],
    }
    if type_name == "KVStrataFs" and "root_dir" not in options:
        extra["secondary_tiers"][1].pop("root_dir", None)  # type: ignore[union-attr]
    transfer = SimpleNamespace(kv_connector="OffloadingConnector", kv_connector_extra_config=extra)
    with pytest.raises(ConfigError, match=message):
        check(SimpleNamespace(kv_transfer_config=transfer, parallel_config=SimpleNamespace()))


def test_entries_of_others_are_left_alone() -> None:
    others = [{"type": "KVStrataFs"}, {"type": "X", "module_path": "x"}, 7]
    check_stock({"spec_name": "TieringOffloadingSpec", "secondary_tiers": others})
    wrong = [entry("KVStrataFs", nonsense=1)]
    check_stock({"spec_name": "AnotherSpec", "secondary_tiers": wrong})
    check_stock({"spec_name": "TieringOffloadingSpec", "secondary_tiers": "nonsense"})


def refused(model: Model, message: str, config: Any = None, **options: Any) -> None:
    with pytest.raises((NamespaceError, RuntimeError), match=message):
        StockWorld(model, entry("KVStrataMemory"), config=config or model.config, **options)


@pytest.mark.parametrize("kind", ["window", "state"])
def test_chunks_with_holes(kind: str) -> None:
    model = Model(kind, 56)
    refused(model, "blocks_per_chunk: 2 .* missing", blocks_per_chunk=2, slots=64)
    StockWorld(model, entry("KVStrataMemory")).close()


def test_blocks_that_are_overwritten_before_they_are_stored(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = Model("state", 56)
    monkeypatch.setattr(type(model.config), "use_v2_model_runner", True)
    refused(states, "second model runner may overwrite")
    StockWorld(model, entry("KVStrataMemory")).close()


def test_weights_that_may_change_or_not(model: Model) -> None:
    config = changed(model.config, enable_sleep_mode=True)
    refused(model, "weights_fixed.*as a key of the tier's entry", config)
    for word in (True, False):
        StockWorld(model, entry("KVStrataMemory", weights_fixed=word), config=config).close()


def test_replicas_over_several_nodes(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model.config.parallel_config), "nnodes_within_dp", 2)
    refused(model, "span several nodes")


def test_xpu(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen, "current_platform", SimpleNamespace(is_xpu=lambda: True))
    refused(model, "does not support XPU")


def test_a_spec_that_nobody_knows_the_engine_of() -> None:
    with pytest.raises(RuntimeError, match="whole configuration"):
        whole_config("an engine")


def test_a_tier_that_cannot_be_opened_leaves_nothing(model: Model, tmp_path: Any) -> None:
    (tmp_path / "file").touch()
    before = set(os.listdir("/proc/self/fd"))
    tier = entry("KVStrataFs", root_dir=str(tmp_path / "file" / "kv"))
    with pytest.raises(ConfigError, match="file"):
        open_manager(model.config, copy.deepcopy(model.kv), [tier], 8)
    assert set(os.listdir("/proc/self/fd")) == before


# -- the memory ------------------------------------------------------------------------


def test_the_file_behind_memory_is_found_without_its_name(tmp_path: Any) -> None:
    path = tmp_path / "memory"
    path.write_bytes(bytes(3 * mmap.PAGESIZE))
    with open(path, "r+b") as file:
        mapped = mmap.mmap(file.fileno(), 0)
        later = mmap.mmap(file.fileno(), mmap.PAGESIZE, offset=mmap.PAGESIZE)
    path.unlink()
    for memory, place in ((mapped, 0), (later, mmap.PAGESIZE)):
        fd, found = open_file_behind(memoryview(memory))
        assert found == place
        os.pwrite(fd, b"x", found)
        os.close(fd)
    assert (mapped[0], mapped[mmap.PAGESIZE], later[0]) == (*b"x", *b"x", *b"x")


def test_memory_without_a_file_is_refused() -> None:
    with pytest.raises(OSError, match="no file"):
        open_file_behind(memoryview(np.zeros(1 << 20, np.int8)))
