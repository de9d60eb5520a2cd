"""The entry point `vllm.general_plugins`: makes `KVStrataSpec` known in every process.

In the one that the user started it also has the configuration checked early.
"""

from __future__ import annotations

import logging

from kvstrata.offload.vllm_plugin.engine.early_check import SPEC_NAME, check_early

SPEC_MODULE = "kvstrata.offload.vllm_plugin.spec"

logger = logging.getLogger("kvstrata")


def register() -> None:
    """Register the spec by name, without importing it.

    Never raises: vLLM does not guard the call, and an engine without our configuration
    must start whatever its version. May be called any number of times.
    """
    try:
        from vllm.v1.kv_offload.factory import OffloadingSpecFactory

        _log_like_vllm()
        OffloadingSpecFactory.register_spec(SPEC_NAME, SPEC_MODULE, SPEC_NAME)
    except ValueError:
        pass  # registered before
    except Exception as error:
        logger.warning("kvstrata is not available in this vLLM: %s", error)
        return
    try:
        check_early()
    except Exception as error:
        logger.debug("kvstrata checks its configuration only once the model is loaded: %s", error)


def _log_like_vllm() -> None:
    """Send our lines where vLLM's go; it configures its logger later than this."""
    logger.parent = logging.getLogger("vllm")
