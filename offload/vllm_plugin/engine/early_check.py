"""The configuration is checked as soon as vLLM's own is complete.

vLLM makes a connector, and the spec with it, once the model is loaded: a wrong key would end the
start after minutes, in the middle of the messages of several processes. It asks the spec for
nothing before. So `VllmConfig` is made to have our part of it checked where it is completed, in
the process that the user started, after a few seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

SPEC_NAME = "KVStrataSpec"  # by which users ask for us
_METHOD = "_post_init_kv_transfer_config"  # of 0.31 to 0.33
_MARK = "checks_kvstrata"  # of ours: other plugins may have theirs
_checked = False  # in this process


def check_early() -> None:
    """Have each `VllmConfig` checked that names our spec. Any number of calls are one.

    Raises:
        ImportError, AttributeError: this vLLM completes its configuration in another way; then
            the spec checks it, late.
    """
    from vllm.config import VllmConfig

    complete = getattr(VllmConfig, _METHOD)
    if hasattr(complete, _MARK):
        return

    @functools.wraps(complete)
    def complete_and_check(self: Any) -> None:
        complete(self)  # which adds the size of --kv-offloading-size
        check(self)

    setattr(complete_and_check, _MARK, True)
    setattr(VllmConfig, _METHOD, complete_and_check)


def check(vllm_config: Any) -> None:
    """Check the configurations of our spec in vLLM's, and of our tiers in those of vLLM's own spec,
    as far as this process can.

    Memory and directories are those of this machine, so they are left out where no engine runs on
    it.

    Raises:
        ConfigError: for the first thing that is wrong.
    """
    parallel = getattr(vllm_config, "parallel_config", None)
    elsewhere = (
        getattr(parallel, "data_parallel_size_local", 1) == 0
        or getattr(parallel, "distributed_executor_backend", None) == "ray"
    )
    global _checked
    for extra in _extra_configs(vllm_config.kv_transfer_config):
        # engines without our spec load this module too
        if extra.get("spec_name") != SPEC_NAME:
            if extra.get("secondary_tiers"):
                from kvstrata.offload.config.stock_entry import check_stock

                check_stock(extra)
            continue
        from kvstrata.offload.config.offload_config import parse_config
        from kvstrata.offload.config.precheck import check_here

        config = parse_config(extra)
        if not elsewhere:
            check_here(config)
        _checked = True


def has_checked() -> bool:
    """Whether this process has checked a configuration of our spec."""
    return _checked


def _extra_configs(transfer: Any) -> Iterator[Mapping[str, Any]]:
    """The `kv_connector_extra_config` of each connector."""
    if transfer is None:
        return
    extra = transfer.kv_connector_extra_config
    children = extra.get("connectors", ()) if transfer.kv_connector == "MultiConnector" else ()
    yield extra
    yield from (child.get("kv_connector_extra_config") or {} for child in children)
