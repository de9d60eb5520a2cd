"""The file behind memory that vLLM mapped, so that other processes can map it too."""

from __future__ import annotations

import os
from contextlib import suppress

import numpy as np


def open_file_behind(view: memoryview) -> tuple[int, int]:
    """A descriptor of the file, for the caller to close, and where in it `view` begins.

    It is a copy of one that this process has: the file may have no name any more.

    Args:
        view: the beginning of what was mapped, shared and writable.

    Raises:
        OSError: the memory is no file's, or this process has no descriptor of it.
    """
    address = int(np.asarray(view).ctypes.data)
    device, inode, place = _mapping(address)
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed meanwhile
            found = os.stat(f"/proc/self/fd/{name}")
            if (found.st_dev, found.st_ino) == (device, inode):
                return os.dup(int(name)), place
    raise OSError("this process has no descriptor of the file that is mapped there")


def _mapping(address: int) -> tuple[int, int, int]:
    """Device, inode and offset of what is mapped at an address; proc_pid_maps(5)."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, _, offset, device, inode, *_ = line.split(maxsplit=5)
            start, end = (int(part, 16) for part in span.split("-"))
            if start <= address < end and inode != "0":
                major, minor = (int(part, 16) for part in device.split(":"))
                place = int(offset, 16) + address - start
                return os.makedev(major, minor), int(inode), place
    raise OSError("the memory is of no file")
