"""How much of this machine's memory may still be taken, and where it is shared."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

SHM = Path("/dev/shm")  # where the CPU tier lives


def available_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes this process may still take: the least of the machine's and the cgroup's."""
    meminfo = _numbers(proc / "meminfo")
    bounds = [meminfo["MemAvailable:"] * 1024]
    for folder, limit, used, prefix in (
        (cgroup, "memory.max", "memory.current", ""),  # version 2
        (cgroup / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),  # 1
    ):
        with suppress(OSError, ValueError):  # no such file; the limit is "max"
            free = int((folder / limit).read_text()) - int((folder / used).read_text())
            # The kernel gives up cached files, such as weights just read, before it refuses.
            stat = _numbers(folder / "memory.stat")
            cached = (stat.get(f"{prefix}{name}_file", 0) for name in ("active", "inactive"))
            bounds.append(free + sum(cached))
    return min(bounds)


def untaken_memory(fd: int, nbytes: int) -> int:
    """Of the first `nbytes` bytes of a file in shared memory, those that take no memory yet."""
    return max(0, nbytes - os.fstat(fd).st_blocks * 512)


def _numbers(path: Path) -> dict[str, int]:
    """The lines `name number ...` of a file of the kernel's."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines}
