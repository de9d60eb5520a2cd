"""The warning of a server that kills its engine when it is told to end."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from vllm.config import VllmConfig  # noqa: E402

from kvstrata.offload.vllm_plugin.engine.shutdown_timeout import warn_of_sudden_stops  # noqa: E402


@pytest.mark.parametrize(
    ("config", "warned"),
    [
        (SimpleNamespace(shutdown_timeout=0), True),
        (SimpleNamespace(shutdown_timeout=15), False),
        (SimpleNamespace(), False),  # a version that does not tell
    ],
)
def test_it_is_said_where_it_can_be_seen(
    config: Any, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_sudden_stops(config)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warned
    assert ("--shutdown-timeout 15" in caplog.text) == warned


def test_this_vllm_tells() -> None:
    assert VllmConfig.__dataclass_fields__["shutdown_timeout"].name
