"""One I/O process, as the engine sees it: no method waits for it."""

from __future__ import annotations

import pickle
import socket
import subprocess
import sys
from contextlib import suppress

from kvstrata.tiers.fs.messages import MAX_PACKET, MAX_SETUP, Setup

# -P: a file of the working directory must not pass for a library
COMMAND = (sys.executable, "-P", "-m", "kvstrata.tiers.fs.worker")


class IoProcess:
    """A running `kvstrata.tiers.fs.worker`.

    It must be started by a thread that lives as long as the process is needed: the kernel
    ends it with the thread. So that none is left behind, it is started by exec and not forked.

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
        try:
            with theirs:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_SETUP)
                self._socket.setblocking(False)
                self._socket.send(pickle.dumps(setup))
                self._process = subprocess.Popen(
                    [*COMMAND, str(theirs.fileno()), str(setup.region.fd)],
                    pass_fds=(theirs.fileno(), setup.region.fd),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    process_group=0,
                )
        except BaseException:
            self._socket.close()
            raise
        self.pid = self._process.pid
        self.broken = False  # it takes no packets any more; `receive` has its last ones

    @property
    def fd(self) -> int:
        """Readable when `receive` has something to say; -1 when it never will again."""
        return self._socket.fileno()

    def send(self, packet: bytes) -> bool:
        """Send a packet; False if it does not take one now."""
        try:
            self._socket.send(packet)
        except BlockingIOError:
            return False
        except OSError:
            self.broken = True
            return False
        return True

    def receive(self) -> bytes | None:
        """The next packet; None if there is none yet, and for ever after `fd` became -1."""
        if self.fd < 0:
            return None
        try:
            packet = self._socket.recv(MAX_PACKET)
        except BlockingIOError:
            return None
        except ConnectionError:
            packet = b""
        if not packet:
            self._socket.close()
            return None
        return packet

    def finish(self) -> None:
        """Let it drop what waits, end what runs, and end itself."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        """End it now, unless the kernel cannot: a process in a dead mount stays for a while."""
        self._process.kill()

    def exit_status(self) -> str | None:
        """None while it lives, and may touch pages; afterwards how it ended, in words."""
        code = self._process.poll()
        if code is None:
            return None
        return f"killed by signal {-code}" if code < 0 else f"exit status {code}"
