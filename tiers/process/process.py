"""One I/O process, as the engine sees it: no method waits for it."""

from __future__ import annotations

import ctypes
import errno
import os
import pickle
import signal
import socket
import subprocess
import sys
from contextlib import suppress

from kvstrata.tiers.process.bell import Bell
from kvstrata.tiers.process.messages import (
    MAX_PACKET,
    MAX_SETUP,
    Kind,
    Setup,
    Task,
    pack,
    packet,
)

# -P: a file of the working directory must not pass for a library
COMMAND = (sys.executable, "-P", "-m", "kvstrata.tiers.process.worker")

# recv(2) and send(2), only ever told not to wait. They keep the GIL: a busy thread that gets it
# from `socket.recv` or `socket.send` has it for 5 ms, for each packet.
_C = ctypes.PyDLL(None, use_errno=True)
_recv, _send = _C.recv, _C.send
_NOTHING_YET = (errno.EAGAIN, errno.EINTR)


class IoProcess:
    """A running `kvstrata.tiers.process.worker`.

    It may be no child of the engine's but of a process that ended (see survival.py), so of its end
    only the socket tells: the kernel closes it when all of the process's threads are gone. Where it
    is one, the thread that starts it must live as long as it is needed: the kernel ends it with the
    thread.

    It has a process group of its own, so that Ctrl-C reaches only the engine, which then stops
    it, but stays in the engine's session. Linux shares the processor among sessions first
    (CONFIG_SCHED_AUTOGROUP, sched(7)), and Linux 6.18 was seen to leave another session
    without any for 10 s while an engine with few cores called sched_yield in its loops.
    """

    def __init__(self, setup: Setup) -> None:
        """Start it.

        Raises:
            OSError: the machine has no room for it.
        """
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        line, self._line = os.pipe()  # open until the engine is gone
        try:
            with theirs, os.fdopen(line), os.fdopen(Bell.make()) as bell:
                self._bell = Bell(bell.fileno())
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_SETUP)
                self._socket.setblocking(False)
                self._socket.send(pickle.dumps(setup))
                descriptors = theirs.fileno(), setup.region.fd, line, bell.fileno()
                self._child = subprocess.Popen(
                    [*COMMAND, *map(str, descriptors)],
                    pass_fds=descriptors,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    process_group=0,
                )
        except BaseException:
            self._close()
            raise
        self.pid = self._child.pid  # until it says that it is another
        self._told = self._killed = False
        self._packet = ctypes.create_string_buffer(MAX_PACKET)
        # It takes no packets any more, or sends what is none; `receive` has its last ones.
        self.broken = False

    @property
    def fd(self) -> int:
        """Readable when `receive` has something to say; -1 when it never will again."""
        return self._socket.fileno()

    @property
    def has_word(self) -> bool:
        """Whether `receive` has something to say, as far as the process lived to ring for it."""
        return self._bell.rung

    def send(self, raw: bytes) -> bool:
        """Send a packet; False if it does not take one now."""
        if _send(self.fd, raw, len(raw), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) >= 0:
            return True
        self.broken = ctypes.get_errno() not in _NOTHING_YET or self.broken
        return False

    def receive(self) -> bytes | None:
        """The next packet; None if there is none yet, and for ever after `fd` became -1."""
        if self.fd < 0:
            return None
        if self._told and self.pid != self._child.pid:
            self._child.poll()  # it has done its part
        self._bell.hush()
        size = _recv(self.fd, self._packet, MAX_PACKET, socket.MSG_DONTWAIT)
        if size < 0 and ctypes.get_errno() in _NOTHING_YET:
            return None
        raw = ctypes.string_at(self._packet, max(size, 0))
        if not raw:
            self._close()
            return None
        if not self._told:  # its first word
            if not raw.isdigit():
                self.broken = True
                return None
            self._told, self.pid = True, int(raw)
            if self._killed:
                self.kill()
            return self.receive()
        return raw

    def finish(self) -> None:
        """Let it drop what waits, end what runs, and end itself."""
        with suppress(OSError):  # it is gone, or so busy that it ends what waits
            self._socket.send(packet([pack(Task(Kind.FINISH, []))]))
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        """End it now, unless the kernel cannot: a process in a dead mount stays for a while."""
        self._killed = True
        self._child.kill()
        if self._told and self.fd >= 0:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def exit_status(self) -> str | None:
        """None while it lives, and may touch pages; afterwards how it ended, in words."""
        if self.fd >= 0 or (code := self._child.poll()) is None:
            return None
        if self.pid != self._child.pid:
            return "it ended"
        return f"killed by signal {-code}" if code < 0 else f"exit status {code}"

    def _close(self) -> None:
        self._socket.close()
        os.close(self._line)
