"""The configuration is checked where vLLM completes its own, before any engine is started."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from vllm.config import CacheConfig, KVTransferConfig, VllmConfig  # noqa: E402

from kvstrata.offload.vllm_plugin.engine import early_check  # noqa: E402
from kvstrata.offload.vllm_plugin.engine.early_check import check, check_early  # noqa: E402
from kvstrata.offload.vllm_plugin.spec import KVStrataSpec  # noqa: E402
from kvstrata.tiers.options import ConfigError  # noqa: E402

OURS = {"spec_name": "KVStrataSpec", "cpu_bytes_to_use": "1MiB"}
WRONG = {**OURS, "cpu_bytes": 1}


def transfer(extra: dict[str, Any], connector: str = "OffloadingConnector") -> KVTransferConfig:
    return KVTransferConfig(
        kv_connector=connector, kv_role="kv_both", kv_connector_extra_config=extra
    )


def vllm_config(config: KVTransferConfig | None, **parallel: Any) -> Any:
    return SimpleNamespace(kv_transfer_config=config, parallel_config=SimpleNamespace(**parallel))


@pytest.fixture(autouse=True)
def vllm_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    method = VllmConfig._post_init_kv_transfer_config
    plain = getattr(method, "__wrapped__", method)
    monkeypatch.setattr(VllmConfig, "_post_init_kv_transfer_config", plain)
    monkeypatch.setattr(early_check, "_checked", False)


def test_vllm_has_it_checked_when_it_completes_its_own() -> None:
    check_early()
    check_early()
    method: Any = VllmConfig._post_init_kv_transfer_config
    assert not hasattr(method.__wrapped__, "__wrapped__"), "once"
    with pytest.raises(ValueError, match="unknown key 'cpu_bytes'"):
        VllmConfig(kv_transfer_config=transfer(WRONG))
    VllmConfig(kv_transfer_config=transfer(OURS))


def test_the_size_of_the_command_line_is_there_by_then() -> None:
    """vLLM multiplies `--kv-offloading-size`, a float, by 2**30."""
    check_early()
    offloading = CacheConfig(kv_offloading_size=1 / 1024, kv_offloading_backend="native")
    given = transfer({"spec_name": "KVStrataSpec"})
    config = VllmConfig(cache_config=offloading, kv_transfer_config=given)
    assert config.kv_transfer_config is not None
    assert config.kv_transfer_config.kv_connector_extra_config["cpu_bytes_to_use"] == 2.0**20


def test_others_are_left_alone() -> None:
    check(vllm_config(None))
    check(vllm_config(transfer({"spec_name": "CPUOffloadingSpec", "anything": 1})))
    check(vllm_config(transfer({}, "LMCacheConnectorV1")))
    check(vllm_config(transfer(OURS)))


def test_among_other_connectors() -> None:
    children = [
        {"kv_connector": "ExampleHiddenStatesConnector"},
        {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": WRONG},
    ]
    with pytest.raises(ConfigError, match="'cpu_bytes'"):
        check(vllm_config(transfer({"connectors": children}, "MultiConnector")))


@pytest.mark.parametrize(
    "parallel", [{"data_parallel_size_local": 0}, {"distributed_executor_backend": "ray"}]
)
def test_the_machine_counts_only_where_engines_run(
    parallel: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    tier = {"type": "fs", "root_dir": str(tmp_path / "file")}
    config = transfer({**OURS, "secondary_tiers": [tier]})
    with pytest.raises(ConfigError, match=r"secondary_tiers\[0\]: .*/file' is not a directory"):
        check(vllm_config(config, data_parallel_size_local=1))
    check(vllm_config(config, **parallel))
    with pytest.raises(ConfigError, match="'cpu_bytes'"):
        check(vllm_config(transfer(WRONG), **parallel))


def test_the_metrics_are_those_of_a_right_configuration() -> None:
    assert KVStrataSpec.build_metric_definitions(OURS)
    with pytest.raises(ConfigError, match="'cpu_bytes'"):
        KVStrataSpec.build_metric_definitions(WRONG)


def test_the_metrics_check_the_machine_where_nothing_was_checked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    extra = {**OURS, "secondary_tiers": [{"type": "fs", "root_dir": str(tmp_path / "file")}]}
    with pytest.raises(ConfigError, match="/file' is not a directory"):
        KVStrataSpec.build_metric_definitions(extra)
    check(vllm_config(transfer(extra), data_parallel_size_local=0))
    assert KVStrataSpec.build_metric_definitions(extra), "no engine runs on this host"
