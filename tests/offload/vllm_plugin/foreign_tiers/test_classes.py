"""Which classes for vLLM's own manager are found, and what is said of those that cannot be used."""

import sys
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from kvstrata.offload.config.offload_config import parse_config  # noqa: E402
from kvstrata.offload.vllm_plugin.foreign_tiers.seal import SEAL_BYTES  # noqa: E402
from kvstrata.tiers.base import TierConfigError  # noqa: E402
from kvstrata.tiers.options import ConfigError  # noqa: E402
from kvstrata.tiers.registry import STOCK, tier_class  # noqa: E402
from tests.offload.vllm_plugin.foreign_tiers.region_world import (  # noqa: E402
    EXAMPLE,
    FS,
    HERE,
    RegionWorld,
    made,
)


def test_vllms_own_are_found_by_their_names() -> None:
    found = {name: tier_class({"type": name}) for name in STOCK if name != "kvcr"}
    assert {name: cls.__name__ for name, cls in found.items()} == {
        "example": "ExampleSecondaryTierManager",
        "obj": "ObjectStoreSecondaryTierManager",
        "p2p": "P2PSecondaryTierManager",
    }
    assert found["example"] is tier_class(EXAMPLE)
    assert {name: cls.medium for name, cls in found.items()} == {
        "example": "CPU",
        "obj": "STORAGE",
        "p2p": None,
    }
    assert tier_class(FS).medium == "STORAGE"
    assert all(cls.tail_bytes == SEAL_BYTES for cls in found.values())


def config(*tiers: dict[str, Any]) -> Any:
    return parse_config({"cpu_bytes_to_use": "1GiB", "secondary_tiers": list(tiers)})


@pytest.mark.parametrize(
    "entry",
    [
        {"type": "p2p", "host": "10.0.0.1", "port": 5710},
        {"type": "p2p", "unbound_store_timeout_s": 180, "enable_kv_events": True},
        {"type": "obj", "store_config": {"bucket": "b"}, "io_threads": 4, "locality": "REMOTE"},
        {"type": "example", "custom_param": 67},
    ],
)
def test_what_vllms_documents_say_of_its_tiers_is_taken(entry: dict[str, Any]) -> None:
    (tier,) = config(entry).tiers
    assert tier.name == entry["type"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"type": "obj"}, r"\[0\]: store_config is missing"),
        ({"type": "kvcr"}, r"\[0\]: type 'kvcr', a tier of vLLM's own, cannot be used: Mod.*kvcr"),
        ({**FS, "rot_dir": "/kv"}, r"unknown key 'rot_dir' \(did you mean 'root_dir'\?\)"),
        (FS, r"root_dir is missing: give it, as FileSystemTierManager of vllm\..* needs it"),
        ({**EXAMPLE, "custom": 1}, r"unknown key 'custom' \(did you mean 'custom_param'\?\)"),
        ({"type": "Nobody", "module_path": HERE}, "cannot be imported.*AttributeError"),
        ({"type": "wait_until", "module_path": "tests.waiting"}, "nor of vLLM's Secondary"),
        ({"type": "World", "module_path": "tests.offload.manager_world"}, "nor of vLLM's Seco"),
    ],
)
def test_a_wrong_entry_is_one_error(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(entry)


def test_one_listed_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="is listed twice"):
        config(made("DictTier"), made("DictTier"))


def test_a_constructor_that_raises_is_one_error() -> None:
    with pytest.raises(
        TierConfigError,
        match=r"^type 'RefusingTier': RefusingTier cannot be made: ValueError: nobody is at there; "
        "correct its options or remove the entry$",
    ):
        RegionWorld(made("RefusingTier", host="there"))


def test_without_vllm_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [each for each in sys.modules if "foreign_tiers.classes" in each]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "vllm.v1.kv_offload.tiering.base", None)
    with pytest.raises(TierConfigError, match=r"^type 'p2p', a tier of vLLM's own, cannot be used"):
        tier_class({"type": "p2p"})
