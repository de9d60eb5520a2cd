"""The I/O process with its I/O calls wrapped: run as `faulty_worker.py CONTROL SOCKET REGION LINE`.

CONTROL is a JSON file of what is to happen, read again before each call; see `Faults`. What it says
at the start of `outlive_s` takes the place of `OUTLIVE_S`.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.process import survival, worker

CALLS = ("open", "pwritev", "preadv", "rename", "fsync", "unlink")


def wrap(name: str, call: Callable[..., Any], control: str) -> Callable[..., Any]:
    def wrapped(*args: Any, **more: Any) -> Any:
        faults: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError), open(control) as file:
            faults = json.load(file)
        if os.geteuid() != faults.get("euid", os.geteuid()):
            os.seteuid(faults["euid"])
        fault = faults.get(name)
        if isinstance(fault, int):
            raise OSError(fault, os.strerror(fault))
        if fault == "surprise":
            raise RuntimeError("surprise")
        while fault == "hang":
            time.sleep(0.01)
            with open(control) as file:
                fault = json.load(file).get(name)
        if fault == "crash":
            os.abort()
        return call(*args, **more)

    return wrapped


if __name__ == "__main__":
    control = sys.argv.pop(1)
    with contextlib.suppress(FileNotFoundError), open(control) as file:
        survival.OUTLIVE_S = json.load(file).get("outlive_s", survival.OUTLIVE_S)
    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name), control))
    nofollow.lstat = wrap("lstat", nofollow.lstat, control)
    opened = nofollow.open
    faulty = wrap("open", opened, control)
    nofollow.open = lambda path, flags, *more, **rest: (opened if flags & os.O_PATH else faulty)(
        path, flags, *more, **rest
    )
    worker.main()
