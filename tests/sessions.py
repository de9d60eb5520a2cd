"""The processes of a session: a program that was started with one of its own, and its helpers."""

import contextlib
import os
import signal
from pathlib import Path

from tests.waiting import wait_until


def pause(pid: int) -> None:
    """Stop a process, as a debugger does; it does nothing more on return."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: {_state(each) for each in Path(f"/proc/{pid}/task").glob("*/stat")} == {"T"})


def _state(stat: Path) -> str:
    return stat.read_text().rpartition(")")[2].split()[0]


def session(leader: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, number, *_ = path.read_text().rpartition(")")[2].split()
            if int(number) == leader and state != "Z":
                found.append(int(path.parent.name))
    return found


def kill_session(leader: int) -> None:
    """End all of them at once, as when the machine goes."""
    for pid in session(leader):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
