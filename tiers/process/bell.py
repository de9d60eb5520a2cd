"""The bell of an I/O process: whether it said something, without a system call.

The engine asks at each step, and often has nothing to hear. With its cache full of other things
a system call took it 10 us, a byte of shared memory well below one.
"""

from __future__ import annotations

import mmap
import os


class Bell:
    """A byte that two processes share. One sets it after each message, the other hears."""

    def __init__(self, fd: int) -> None:
        """`fd` is from `Bell.make`, also in the other process; not needed afterwards."""
        self._memory = mmap.mmap(fd, mmap.PAGESIZE)

    @staticmethod
    def make() -> int:
        """A descriptor of new shared memory for a bell.

        Raises:
            OSError: the machine has no room for it.
        """
        fd = os.memfd_create("kvstrata-bell")
        os.ftruncate(fd, mmap.PAGESIZE)
        return fd

    def ring(self) -> None:
        """There is a message; to be called once it can be read."""
        self._memory[0] = 1

    @property
    def rung(self) -> bool:
        """Whether there may be one."""
        return self._memory[0] != 0

    def hush(self) -> None:
        """To be called before all messages are read."""
        self._memory[0] = 0
