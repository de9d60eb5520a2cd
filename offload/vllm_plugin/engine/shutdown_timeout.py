"""What a stop of the server leaves of the pages on their way to the secondary tiers."""

from __future__ import annotations

import logging

from vllm.config import VllmConfig

logger = logging.getLogger("kvstrata")


def warn_of_sudden_stops(config: VllmConfig) -> None:
    """Say what is lost, and what to do, where a server kills its engine when it is told to end."""
    if getattr(config, "shutdown_timeout", None) == 0:
        logger.warning(
            "kvstrata: --shutdown-timeout is 0, vLLM's default: a server that is told to end "
            "(SIGTERM, Ctrl-C) kills its engine at once, and the pages that the engine has not "
            "yet handed to its secondary tiers are lost, those of the last answers above all; in "
            "a container also those that are not yet written. Start vLLM with "
            "--shutdown-timeout 15, and let whoever stops it wait for longer than that"
        )
