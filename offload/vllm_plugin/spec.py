"""KVStrataSpec: what vLLM's OffloadingConnector makes of `"spec_name": "KVStrataSpec"`."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    OffloadingManager,
    OffloadingMetricMetadata,
    OffloadingSpec,
    OffloadingWorker,
)
from vllm.v1.kv_offload.config import OffloadingConfig

from kvstrata.offload.config.offload_config import parse_config
from kvstrata.offload.config.precheck import check_here
from kvstrata.offload.vllm_plugin.engine.early_check import has_checked
from kvstrata.offload.vllm_plugin.engine.version import check_version
from kvstrata.offload.vllm_plugin.foreign_tiers import told
from kvstrata.offload.vllm_plugin.metrics.config_info import CONFIG_INFO_KEYS
from kvstrata.offload.vllm_plugin.metrics.definitions import metric_definitions
from kvstrata.offload.vllm_plugin.metrics.old_names import old_definitions
from kvstrata.offload.vllm_plugin.metrics.stock_names import stock_definitions


class KVStrataSpec(OffloadingSpec):
    """One instance in the scheduler's process and one in each worker's."""

    @classmethod
    def build_metric_definitions(
        cls, extra_config: dict[str, Any]
    ) -> dict[str, OffloadingMetricMetadata]:
        """Prometheus metrics; called in the API server's process.

        Raises:
            ConfigError: the configuration is wrong; `early_check.py` has said so before, but where
                VLLM_PLUGINS keeps it from being loaded.
        """
        settings = parse_config(extra_config)
        if not has_checked():
            check_here(settings)
        return (
            stock_definitions()
            | told.metric_definitions(settings.tiers)
            | old_definitions()
            | metric_definitions()
        )

    @classmethod
    def config_info_keys(cls, extra_config: dict[str, Any]) -> tuple[str, ...]:
        """vLLM 0.33: the label names of `config_info`; called in the API server's process."""
        return (*CONFIG_INFO_KEYS, *told.config_info_keys(parse_config(extra_config).tiers))

    def __init__(self, config: OffloadingConfig) -> None:
        """Check the version and the configuration.

        Raises:
            RuntimeError: this vLLM or platform is not supported.
            ConfigError: naming the key, the value and the remedy.
        """
        check_version()
        if current_platform.is_xpu():
            raise RuntimeError("kvstrata does not support XPU: use CUDA, or vLLM's CPU build")
        self._settings = parse_config(config.extra_config)
        super().__init__(config)
        self._manager: OffloadingManager | None = None
        self._worker: OffloadingWorker | None = None

    def get_manager(self) -> OffloadingManager:
        """The scheduler's side; the workers have registered before."""
        if self._manager is None:
            from kvstrata.offload.vllm_plugin.scheduler import open_scheduler

            self._manager = open_scheduler(
                self.config, self._settings, events=self.kv_events_config.enable_kv_cache_events
            )
        return self._manager

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """This worker's side. All workers must call it."""
        if self._worker is None:
            from kvstrata.offload.vllm_plugin.registration import open_worker

            self._worker = open_worker(self.config, self._settings, kv_caches)
        return self._worker
