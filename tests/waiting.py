"""Waiting for what other threads and processes do."""

import time
from collections.abc import Callable

PATIENCE_S = 60.0  # only a fault meets it


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until it holds; a test that waits for a minute has failed."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.002)
