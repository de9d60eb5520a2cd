"""Other KV connectors in the same engine, by vLLM's MultiConnector.

Beside one that writes to the KV cache no store is safe, so only such are supported that never do,
whatever a request asks for. vLLM before 0.33 does not tell this connector of blocks that it gives
to another one's load, so that a store that still reads them is not flushed first. In any version,
blocks that another connector loads within a step are offered for storing in that step, before it
is known whether the load failed; and what was loaded was computed by an engine of which the
namespace of these pages says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.config import KVTransferConfig

_OURS = "OffloadingConnector"
_SUPPORTED = (
    "ExampleHiddenStatesConnector, and MooncakeConnector with kv_role kv_producer, which never "
    "write to the KV cache"
)


class ConnectorError(RuntimeError):
    """Another connector is configured that may write to the KV cache."""


def check_other_connectors(config: KVTransferConfig) -> None:
    """Refuse connectors beside which a page may be stored wrong.

    Raises:
        ConnectorError: naming the connector, and those that are supported.
    """
    if config.kv_connector == _OURS:
        return
    if config.kv_connector != "MultiConnector" or config.kv_connector_module_path:
        raise ConnectorError(
            f"kv_connector {config.kv_connector!r} is not supported: use OffloadingConnector, "
            "alone or in vLLM's MultiConnector"
        )
    children = config.kv_connector_extra_config.get("connectors", [])
    others = [child.get("kv_connector") for child in children if not _never_writes(child)]
    if _OURS in others:
        others.remove(_OURS)  # this one; another one would load
    if others:
        raise ConnectorError(
            f"{', '.join(map(repr, others))} in MultiConnector may write to KV blocks that are "
            f"being stored: use {_OURS} alone, or beside {_SUPPORTED}"
        )


def _never_writes(child: Mapping[str, Any]) -> bool:
    """Whether a connector loads nothing for any request (its get_num_new_matched_tokens, in 0.31
    to 0.33; Mooncake's asserts that a producer is not asked to)."""
    if child.get("kv_connector_module_path"):
        return False
    name = child.get("kv_connector")
    return name == "ExampleHiddenStatesConnector" or (
        name == "MooncakeConnector" and child.get("kv_role") == "kv_producer"
    )
