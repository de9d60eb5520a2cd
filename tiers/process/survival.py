"""How an I/O process outlives its engine, for a bounded moment, to write what it was given.

A server that is told to end, with `--shutdown-timeout 0`, which is vLLM's default, kills its engine
at once, with SIGKILL, and with it all processes that descend from it. So an I/O process is none of
them, and looks for itself whether its engine lives. The region stays mapped until it ends.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import FrameType
from typing import Any

from kvstrata.tiers.base import EPOCH, unseen_reason
from kvstrata.tiers.machine.liveness import is_running
from kvstrata.tiers.process.messages import MAX_PACKET

# From the engine's death on. Enough for some GiB; whoever starts the server anew takes longer.
OUTLIVE_S = 5.0
_LOOK_S = 0.25


def is_worthwhile(namespace: Mapping[str, Any]) -> bool:
    """Whether anybody can read the pages of this namespace once the engine has ended."""
    return EPOCH not in namespace and not any(map(unseen_reason, namespace.values()))


def leave_family() -> None:
    """Go on as a child of this process, and once it has ended: nothing descends from the engine.

    With its end the group has no parent, and what is stopped in it then, the kernel continues
    (exit(3)).
    """
    family = os.getpid()
    if os.fork():
        os._exit(0)
    while os.getppid() == family:
        time.sleep(0.001)


def end_on_the_second_signal() -> None:
    """Take one SIGTERM or SIGINT as said to the engine, which then says when to end.

    systemd sends its signal to all processes of a service.
    """

    def default_from_now_on(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, default_from_now_on)


def wake_at_the_end_of(line: int) -> None:
    """Have this process continued, should it be stopped, when nobody holds the pipe's other end."""
    with suppress(OSError):  # not every sandbox can
        fcntl.fcntl(line, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(line, fcntl.F_SETSIG, signal.SIGCONT)
        fcntl.fcntl(line, fcntl.F_SETFL, os.O_ASYNC)


def watch(engine: int, started: int, control: socket.socket) -> None:
    """Let `packets` end when the engine is gone, also if forked copies of it keep the socket open.

    `engine` is its process id, and `started` when it started, see `liveness.process_state`.
    """

    def look() -> None:
        while is_running(engine, started):
            time.sleep(_LOOK_S)
        with suppress(OSError):  # closed meanwhile
            control.shutdown(socket.SHUT_RD)

    threading.Thread(target=look, name="kvstrata-io-engine", daemon=True).start()


def packets(control: socket.socket) -> Iterator[bytes]:
    """All that the engine sends, and has sent, until it closes the socket or is gone."""
    while True:
        try:
            packet = control.recv(MAX_PACKET)
        except ConnectionResetError:  # it left records unread; what it sent follows
            continue
        if not packet:
            return
        yield packet


def end_in_time() -> None:
    """End this process in `OUTLIVE_S` seconds at most, whatever it is doing."""
    timer = threading.Timer(OUTLIVE_S, os._exit, (1,))
    timer.daemon = True
    timer.start()
