import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from kvstrata.tiers import registry
from kvstrata.tiers.base import TierConfigError
from kvstrata.tiers.fs.tier import FsTier
from kvstrata.tiers.memory import MemoryTier
from kvstrata.tiers.pool.tier import PoolTier
from kvstrata.tiers.registry import BUILT_IN, tier_class, tier_options

TIER = """
from kvstrata.tiers.memory import MemoryTier
class Mine(MemoryTier): pass
class NoTier: pass
class SecondaryTierManager: __module__ = "vllm.v1.kv_offload.tiering.base"
class Stock(SecondaryTierManager): pass
"""


@pytest.fixture
def foreign_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "foreign_tier.py").write_text(TIER)
    (tmp_path / "broken_tier.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "foreign_tier", raising=False)
    return "foreign_tier"


def test_built_in_types() -> None:
    assert tier_class({"type": "memory"}) is MemoryTier
    assert tier_class({"type": "fs", "root_dir": "/x"}) is FsTier
    assert tier_class({"type": "pool", "name": "x"}) is PoolTier
    assert set(BUILT_IN) == {"memory", "fs", "pool", "object", "valkey", "mooncake"}


def test_class_by_module_path(foreign_module: str) -> None:
    found = tier_class({"type": "Mine", "module_path": foreign_module})
    assert found.__name__ == "Mine" and issubclass(found, MemoryTier)


def test_class_by_entry_point(foreign_module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("mine", f"{foreign_module}:Mine", "kvstrata.tiers")
    monkeypatch.setattr(registry, "entry_points", lambda **k: EntryPoints([point]).select(**k))
    assert tier_class({"type": "mine"}).__name__ == "Mine"
    with pytest.raises(
        TierConfigError,
        match=r"did you mean 'mine'.*known types: fs, memory, mine, mooncake, object, pool, valkey",
    ):
        tier_class({"type": "mina"})


def test_options_are_the_rest() -> None:
    entry = {"type": "fs", "module_path": "x", "root_dir": "/a", "io": "auto"}
    assert tier_options(entry) == {"root_dir": "/a", "io": "auto"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"type": "memry"}, r"'memry' \(did you mean 'memory'\?\); known types: fs, memory"),
        *(
            (
                {"type": name},
                rf"^unknown type '{name}' \(did you mean 'object'\?\); known types: fs,",
            )
            for name in (
                "s3",
                "S3",
                "gcs",
                "gs",
                "azure",
                "az",
                "bucket",
                "blob",
                "minio",
                "objects",
            )
        ),
        ({"type": "nfs4"}, r"^unknown type 'nfs4' \(did you mean 'fs'\?\)"),
        ({}, r'^"type" is missing; give one of fs, memory, .*, p2p,'),
        ({"type": None}, r'^"type": None is wrong; give one of fs, memory'),
        ({"type": "redis"}, r"'redis' \(did you mean 'valkey'\?\)"),
        ({"type": "MooncakeStore"}, r"\(did you mean 'mooncake'\?\)"),
        ({"type": "p2"}, "^unknown type 'p2'.*p2p"),
        ({"type": "KVStrataFs"}, "^type: 'KVStrataFs' is for vLLM's own .*here the type is 'fs'"),
        *(
            (
                {"type": f"KVStrata{name.capitalize()}", "module_path": registry.STOCK_MODULE},
                f"^type: 'KVStrata.*' is for vLLM's own .*; here the type is '{name}'",
            )
            for name in BUILT_IN
        ),
        ({"type": "FS"}, r"'FS' \(did you mean 'fs'\?\)"),
        ({"type": 3}, r'"type": 3 is wrong'),
        ({"type": "Mine", "module_path": 1}, "module_path: 1 is wrong"),
        ({"type": "Mine", "module_path": "no_such_module"}, "'no_such_module': ModuleNotFound"),
        ({"type": "Absent", "module_path": "foreign_tier"}, "'foreign_tier': AttributeError"),
        ({"type": "NoTier", "module_path": "foreign_tier"}, "not a subclass"),
        ({"type": "X", "module_path": "broken_tier"}, "^type 'X' cannot .*ZeroDivisionError"),
        ({"type": "X", "module_path": ".relative"}, "cannot be imported"),
    ],
)
@pytest.mark.usefixtures("foreign_module")
def test_errors(entry: dict[str, object], message: str) -> None:
    with pytest.raises(TierConfigError, match=message):
        tier_class(entry)
