"""The client's own loops: a page to or from the medium, without anything of kvstrata's.

Each function is called once in a process, and returns what its threads call: with a name, a view
of the page, and whether to store it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvstrata.tiers.fs.files.direct_io import probe_direct

Move = Callable[[str, memoryview, bool], object]


def files(directory: str, page_bytes: int) -> Move:
    """A file per page, direct where the disk can; overwritten in place."""
    direct = os.O_DIRECT if probe_direct(directory) else 0

    def move(name: str, view: memoryview, store: bool) -> None:
        flags = os.O_WRONLY | os.O_CREAT if store else os.O_RDONLY
        file = os.open(f"{directory}/{name}", flags | direct, 0o600)
        moved = os.pwrite(file, view, 0) if store else os.preadv(file, [view], 0)
        os.close(file)
        assert moved == page_bytes

    return move


def memory(directory: str, page_bytes: int) -> Move:
    """A copy to or from memory that is mapped, and there."""
    mapped: dict[str, Any] = {}

    def place(name: str) -> int:
        if name not in mapped:
            file = Path(directory, name)
            if not file.exists():
                file.write_bytes(bytes(page_bytes))
            with file.open("r+b") as opened:
                pages = mmap.mmap(opened.fileno(), page_bytes, flags=mmap.MAP_SHARED | 0x8000)
            mapped[name] = (ctypes.c_char * page_bytes).from_buffer(pages)
        return ctypes.addressof(mapped[name])

    def move(name: str, view: memoryview, store: bool) -> None:
        here = ctypes.addressof((ctypes.c_char * page_bytes).from_buffer(view))
        pair = (place(name), here) if store else (here, place(name))
        ctypes.memmove(*pair, page_bytes)

    return move


def objects(options: Mapping[str, Any], page_bytes: int) -> Move:
    """obstore's put and get; the bytes of an answer are copied into the page."""
    from kvstrata.tiers.object.bucket import open_store
    from kvstrata.tiers.object.config import ObjectConfig

    store_ = open_store(ObjectConfig.parse({**options, "url": f"{options['url']}-raw"}))

    def move(name: str, view: memoryview, store: bool) -> None:
        if store:
            store_.put(name, bytes(view), use_multipart=False)
        else:
            view[:] = memoryview(store_.get(name).bytes())

    return move


def values(options: Mapping[str, Any], page_bytes: int) -> Move:
    """glide's SET and GET, the latter into the page."""
    from glide_sync import GlideClient, GlideClientConfiguration, NodeAddress

    host, port = options["url"].removeprefix("valkey://").split(":")
    client = GlideClient.create(
        GlideClientConfiguration([NodeAddress(host, int(port))], request_timeout=10_000)
    )

    def move(name: str, view: memoryview, store: bool) -> None:
        if store:
            client.set(name, view)
        else:
            assert client.get(name, buffer=view) == str(page_bytes).encode()

    return move


def lent_memory(options: Mapping[str, Any], page_bytes: int) -> Move:
    """Mooncake's put from the page, and get into it."""
    os.environ |= {"MC_STORE_MEMCPY": "0", "MC_LOG_LEVEL": "ERROR"}
    from mooncake.store import MooncakeDistributedStore

    client = MooncakeDistributedStore()
    assert client.setup("127.0.0.1", "P2PHANDSHAKE", 0, 0, "tcp", "", options["master"]) == 0

    def move(name: str, view: memoryview, store: bool) -> None:
        place = ctypes.addressof(ctypes.c_char.from_buffer(view))
        call, answer = (client.put_from, 0) if store else (client.get_into, page_bytes)
        assert call(name, place, page_bytes) == answer

    return move
