"""Whether the library would use RDMA here, where it is asked to.

Without a device that it can use it takes TCP and does not say so. Then whoever reaches the
process's port may read and write what is registered for RDMA: the engine's pages.
"""

from __future__ import annotations

import os
from pathlib import Path

DEVICES, NODES = Path("/sys/class/infiniband"), Path("/dev/infiniband")


def has_device() -> bool:
    """Whether there is a device with an active port that this process may open."""
    return any(_is_active(device) and _can_be_opened(device) for device in _devices())


def _devices() -> list[Path]:
    try:
        return list(DEVICES.iterdir())
    except OSError:
        return []


def _is_active(device: Path) -> bool:
    states = device.glob("ports/*/state")  # "4: ACTIVE"
    return any(state.read_text().split()[-1:] == ["ACTIVE"] for state in states)


def _can_be_opened(device: Path) -> bool:
    verbs = (device / "device" / "infiniband_verbs").glob("uverbs*")
    return any(os.access(NODES / each.name, os.R_OK | os.W_OK) for each in verbs)
