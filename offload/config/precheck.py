"""What this machine says to a configuration, before a model is loaded. Nothing is changed."""

from __future__ import annotations

import os
from pathlib import Path

from kvstrata.offload.config.offload_config import OffloadConfig
from kvstrata.tiers.fs.refusals import refusal_by_look
from kvstrata.tiers.machine.disk import disk_at
from kvstrata.tiers.machine.memory import SHM
from kvstrata.tiers.options import ConfigError, format_bytes


def check_here(config: OffloadConfig, shm: Path = SHM) -> None:
    """Refuse what cannot work on this machine, however much of it is free.

    Raises:
        ConfigError: naming the key or tier, the value and the remedy.
    """
    check_size(config.cpu_bytes, shm)
    if config.record is not None:
        check_record(config.record)
    for index, tier in enumerate(config.tiers):
        for path in tier.directories if tier.is_required else ():
            if why := refusal_by_look(path):
                raise ConfigError(f"secondary_tiers[{index}]: {path!r} {why}")


def check_record(path: str) -> None:
    """Refuse a recording that cannot be made.

    Raises:
        ConfigError: naming the key, the value and the remedy.
    """
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        why = f"there is no directory {directory!r}; make it, or give a file in another"
    elif os.path.isdir(path):
        why = "it is a directory; give a file in it"
    elif os.path.lexists(path) and not os.path.isfile(path):
        why = "something is there that is no file; give another name"
    elif not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
        why = f"no file can be made in {directory!r}; let this user write there, or give another"
    else:
        return
    raise ConfigError(f"record: {path!r}: {why}")


def check_size(cpu_bytes: int, shm: Path = SHM) -> None:
    """Refuse a CPU tier that is larger than the memory of this machine.

    Raises:
        ConfigError: naming the key, the value and the remedy.
    """
    size = format_bytes(cpu_bytes)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if cpu_bytes > memory:
        raise ConfigError(
            f"cpu_bytes_to_use: {size} is more than this machine's memory, {format_bytes(memory)}: "
            "lower it"
        )
    try:
        total = disk_at(shm).total  # 0 where there is no limit
    except OSError as error:
        raise ConfigError(
            f"cpu_bytes_to_use: the CPU tier lives in {shm}, which cannot be used: "
            f"{error.strerror}; mount a tmpfs there"
        ) from error
    if 0 < total < cpu_bytes:
        raise ConfigError(
            f"cpu_bytes_to_use: {size} is more than {shm}, where the CPU tier lives, holds in all, "
            f"{format_bytes(total)}: lower it, or make {shm} larger (containers: --shm-size)"
        )
