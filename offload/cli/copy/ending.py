"""How a command that has begun something ends: with that removed, or finished, and a last word."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def ended_gently() -> Iterator[None]:
    """SIGTERM ends what is done here as Ctrl-C does, with a KeyboardInterrupt."""

    def end(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
