"""The client of the mooncake tier: one for each process, which its threads share.

Never in the engine's process: it starts threads, listens on two ports, and writes to descriptor 2.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

from kvstrata.tiers.mooncake.config import MooncakeOptions
from kvstrata.tiers.mooncake.rdma import has_device
from kvstrata.tiers.process.away import Away

# What the library's calls answer; there are more.
FULL, ABSENT, NOT_READY, GONE = -200, -704, -703, -712
_OK, _MASTER_FAILED, _MASTER_SILENT = 0, -900, -901
_WORDS = {
    FULL: "no room in the memory that is lent, or none is lent",
    -707: "the transfer took longer than the master's default_kv_lease_ttl",
    -800: "a process that lends memory is gone, or does not go on",
    _MASTER_FAILED: "the master is away",
    _MASTER_SILENT: "the master does not answer in time",
}

Parts = Sequence[memoryview]  # what lies one behind the other in a value


class Client:
    """Asks the pool. Each call ends: see `MooncakeOptions.timeout_s`, and `Away`.

    Where the master cannot be asked it is an `OSError`.
    """

    def __init__(self, options: MooncakeOptions, *, segment: int) -> None:
        """Make it, without a connection.

        Args:
            options: `segment` in them does not count.
            segment: bytes of memory to lend from the connection on.
        """
        self._options, self._segment = options, segment
        self._registers = options.protocol == "rdma" and has_device()
        self._lock = threading.Lock()  # for the following
        self._connected: Any = None
        self._memory: dict[int, object] = {}  # registered: what views are of, by identity
        self._away = Away()  # the master

    def connect(self) -> Any:
        """The library's client, connected; it connects anew by itself if it must.

        Raises:
            ImportError: the library, or one that it needs, is not installed.
        """
        with self._lock:
            begun = self._away.begin()
            if self._connected is None:
                try:
                    self._connected = _connect(self._options, self._segment)
                except OSError as error:
                    self._away.silent(begun, error)
                    raise
            return self._connected

    def exist(self, names: Sequence[str]) -> list[bool]:
        """Which values are there; the master spares those for a while."""
        codes = self._ask(lambda client: client.batch_is_exist(list(names)))
        for code in codes:
            if code < _OK:
                raise OSError(self.describe(code))
        return [code == 1 for code in codes]

    def put(self, names: Sequence[str], values: Sequence[Parts], pin_s: float = 0.0) -> list[int]:
        """Keep the values, straight from where the parts are; not over those that are there.

        Args:
            names: of the values.
            values: of each the parts.
            pin_s: for so many seconds they are the last to be evicted.

        Returns:
            of each what the library says, which is negative of one that was not kept.
        """
        return self._move("batch_put_from_multi_buffers", names, values, _how_to_keep(pin_s))

    def get(self, names: Sequence[str], values: Sequence[Parts]) -> list[int]:
        """Fill the parts with the values, which must have as many bytes as they.

        A part that was not filled is not touched any more: the library closes the connection
        before it gives up. It would not after a minute, but the process is replaced before that.

        Returns:
            of each its bytes, or what the library says against it, which is negative.
        """
        return self._move("batch_get_into_multi_buffers", names, values)

    def size(self, name: str) -> int:
        """Bytes of the value, or what the library says against it, which is negative."""
        return int(self._ask(lambda client: [client.get_size(name)])[0])

    def start(self, name: str, nbytes: int) -> bytes:
        """The first bytes of a value that has as many, for a look at what it is."""
        room = mmap.mmap(-1, nbytes)
        with memoryview(room) as view:
            place = _address(view)

        def get(client: Any) -> list[int]:
            client.register_buffer(place, nbytes)  # this call of the library's insists on it
            try:
                whole = [place], [[name]], [[[0]]], [[[0]]], [[[nbytes]]]
                return list(client.get_into_ranges(*whole)[0][0])
            finally:
                client.unregister_buffer(place)

        (code,) = self._ask(get)
        if code != nbytes:
            raise OSError(self.describe(code))
        return bytes(room)

    def remove(self, names: Sequence[str]) -> None:
        """Drop the values, also those that the master spares."""
        for code in self._ask(lambda client: client.batch_remove(list(names), True)):
            if code not in (_OK, ABSENT):
                raise OSError(self.describe(code))

    def close(self) -> None:
        """No further call follows; what was lent is taken back, with the pages in it.

        It takes a second, which a client that lent nothing need not spend: nobody asks it.
        """
        if self._connected is not None and self._segment:
            self._connected.close()

    def describe(self, code: int) -> str:
        """What one of the library's negative answers means."""
        return f"{self._options.master}: {_WORDS.get(code, 'it failed')} ({code})"

    def _move(
        self, method: str, names: Sequence[str], values: Sequence[Parts], *more: object
    ) -> list[int]:
        self._register([part for parts in values for part in parts])
        places = [list(map(_address, parts)) for parts in values]
        sizes = [list(map(len, parts)) for parts in values]
        whole = list(names), places, sizes, *more
        return self._ask(lambda client: getattr(client, method)(*whole))

    def _ask(self, ask: Callable[[Any], list[int]]) -> list[int]:
        client = self.connect()
        begun = self._away.begin()
        codes = ask(client)
        for code in codes:
            if code in (_MASTER_FAILED, _MASTER_SILENT):
                failure = OSError(self.describe(code))
                self._away.silent(begun, failure)
                raise failure
        self._away.answered()
        return codes

    def _register(self, views: Sequence[memoryview]) -> None:
        """Tell the library of the memory that the views are of: of each once, and as a whole.

        Not over TCP, which needs no such thing, and where whoever reaches the process's port may
        read and write what is registered: the engine's pages, after they were verified.
        """
        if not self._registers:
            return
        client = self.connect()
        for view in views:
            memory = view.obj
            with self._lock:
                if id(memory) in self._memory:
                    continue
                with memoryview(memory) as whole:
                    code = client.register_buffer(_address(whole), whole.nbytes)
                if code != _OK:
                    raise OSError(f"memory cannot be registered ({code})")
                self._memory[id(memory)] = memory


def _how_to_keep(pin_s: float) -> Any:
    """The library's word for it."""
    from mooncake.store import ReplicateConfig, SoftPinAction

    config = ReplicateConfig()
    if pin_s > 0.0:
        config.soft_pin_action = SoftPinAction.ENABLE
        config.soft_pin_ttl_ms = math.ceil(1000 * pin_s)
    return config


def _connect(options: MooncakeOptions, segment: int) -> Any:
    """The library's client, connected.

    Raises:
        OSError, ImportError: see `Client.connect`.
    """
    try:
        with socket.create_connection(options.address, options.timeout_s) as way:
            ours = way.getsockname()[0]  # by which the others reach this machine
    except OSError as error:
        raise OSError(f"{options.master}: {error.strerror or error}") from None
    milliseconds = str(max(1, int(options.timeout_s * 1000)))
    seconds = str(math.ceil(options.timeout_s))
    os.environ.pop("MC_FORCE_TCP", None)  # see rdma.py
    os.environ.update(
        MC_RPC_TIMEOUT_MS=milliseconds,
        MC_RPC_CONNECT_TIMEOUT_MS=milliseconds,
        MC_STORE_CLIENT_SETUP_RETRIES="1",
        # for a process that lends memory: to begin its answer, and to go on with it
        MC_TCP_STATUS_TIMEOUT_SEC=seconds,
        MC_TCP_PROGRESS_TIMEOUT_SEC=seconds,
        # the library's guess at what lies in this process could be wrong
        MC_STORE_MEMCPY="0",
    )
    from mooncake.store import MooncakeDistributedStore

    client = MooncakeDistributedStore()
    place = ours, "P2PHANDSHAKE", segment, 0, options.protocol, "", options.master
    code = client.setup(*place)
    if code != _OK:
        raise OSError(f"{options.master}: it cannot be set up ({code})")
    return client


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
