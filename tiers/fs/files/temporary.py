"""Names of files that are not published yet, and removal of those whose writer died.

    .kvstrata-<host>-<pid>-<start>-<random>.tmp

`<host>` stands for the machine's boot and the pid namespace, so a pid is only ever looked up
where it means something. `<start>` is the writer's start time from /proc/<pid>/stat (clock
ticks since boot), so another process that got the same pid is not taken for the writer.
`<random>` comes from `secrets`: vLLM seeds `random` alike in all its processes.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import secrets
import stat
import threading
import time
from contextlib import suppress

from kvstrata.tiers.fs.files import nofollow
from kvstrata.tiers.machine.liveness import is_running, process_state

# Files of other hosts (or of this one before a reboot) go when they are this old, in
# seconds: no writer holds a single page that long.
FOREIGN_AGE_S = 24 * 3600.0

_NAME = re.compile(r"\.kvstrata-([0-9a-f]{12})-([0-9]{1,10})-([0-9]{1,20})-[0-9a-f]{16}\.tmp")


def temporary_name() -> str:
    """A new name, unique among all writers."""
    return f"{_writer(os.getpid())}-{secrets.token_hex(8)}.tmp"


def is_temporary(name: str) -> bool:
    """Whether `temporary_name` could have made this name."""
    return _NAME.fullmatch(name) is not None


def is_abandoned(name: str, age_s: float) -> bool:
    """Whether the temporary `name`, last written `age_s` seconds ago, has no living writer."""
    match = _NAME.fullmatch(name)
    if match is None:
        return False
    host, pid, start = match[1], int(match[2]), int(match[3])
    if host != host_name():
        return age_s > FOREIGN_AGE_S
    return not is_running(pid, start)


def sweep(directory: str, stop: threading.Event) -> int:
    """Remove abandoned temporaries below `directory`; returns how many.

    Symbolic links are not followed, and what cannot be read or removed is left alone.
    """
    removed = 0
    pending = [directory]
    while pending and not stop.is_set():
        directory = pending.pop()
        with suppress(OSError), nofollow.scandir(directory) as entries:
            for entry in entries:
                if stop.is_set():
                    break
                if entry.is_dir(follow_symlinks=False):
                    pending.append(os.path.join(directory, entry.name))
                elif is_temporary(entry.name):
                    removed += remove_abandoned(os.path.join(directory, entry.name))
    return removed


def has_no_writer(path: str) -> bool:
    """Whether the temporary at `path` is a plain file whose writer is dead."""
    with suppress(OSError):
        found = nofollow.lstat(path)
        age_s = time.time() - found.st_mtime
        return stat.S_ISREG(found.st_mode) and is_abandoned(os.path.basename(path), age_s)
    return False


def remove_abandoned(path: str) -> bool:
    """Remove the temporary at `path` if its writer is dead; whether that was done."""
    with suppress(OSError):
        if has_no_writer(path):
            nofollow.unlink(path)
            return True
    return False


@functools.cache
def _writer(pid: int) -> str:
    return f".kvstrata-{host_name()}-{pid}-{process_state(pid)[1]}"


def host_name() -> str:
    """12 hex digits for this boot of this machine and the pid namespace of this process."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    return hashlib.sha256(f"{boot} {os.readlink('/proc/self/ns/pid')}".encode()).hexdigest()[:12]
