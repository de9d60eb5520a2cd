"""Whether a process lives, by its id and when it started."""

from __future__ import annotations

import os


def is_running(pid: int, start: int) -> bool:
    """Whether the process lives that had this id and start time; True where it is hidden."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it lives and belongs to another user
    state, now = process_state(pid)
    return state not in ("Z", "X") and (state == "" or now == start)


def process_state(pid: int) -> tuple[str, int]:
    """State and start time (proc(5): fields 3 and 22), or ("", 0) where they are hidden."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # the command's name, in parentheses, may hold spaces and parentheses
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return "", 0
    return fields[0].decode(), int(fields[19])
