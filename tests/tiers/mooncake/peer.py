"""A process that lends memory to a pool, and writes and reads values as it is told.

It shares nothing with the tier's client but the library: `python peer.py HOST:PORT SEGMENT`, a line
of JSON for each question and each answer.
"""

import base64
import ctypes
import json
import os
import sys
from typing import Any

os.environ |= {"MC_STORE_CLIENT_SETUP_RETRIES": "1", "MC_STORE_MEMCPY": "0"}

from mooncake.engine import TransferEngine
from mooncake.store import MooncakeDistributedStore, ReplicateConfig


def answer(client: Any, question: str, *given: Any) -> object:
    if question == "peek":
        return peek(*given)
    if question == "clear":
        client.remove_all(True)
        return None
    name, *rest = given
    if question == "put":  # whatever was there
        client.remove(name, True)
        pinned = ReplicateConfig()
        pinned.with_hard_pin = len(rest) > 1  # never evicted
        return client.put(name, base64.b64decode(rest[0]), pinned)
    if question == "get":
        size = client.get_size(name)
        return base64.b64encode(client.get(name)).decode() if size >= 0 else None
    if question == "drop":  # unless somebody was promised that it stays for a while
        return client.remove(name)
    raise ValueError(question)


def peek(port: int, address: int | None) -> list[int]:
    """What the library says when memory of the process behind the port is read, and written.

    That at the address; or by default what the process offers first.
    """
    engine = TransferEngine()
    engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "")
    room = ctypes.create_string_buffer(64)
    mine, theirs = ctypes.addressof(room), f"127.0.0.1:{port}"
    engine.register_memory(mine, len(room))
    if address is None:
        address = engine.get_first_buffer_address(theirs)
    return [
        engine.transfer_sync_read(theirs, mine, address, len(room)),
        engine.transfer_sync_write(theirs, mine, address, len(room)),
    ]


def main() -> None:
    master, segment = sys.argv[1], int(sys.argv[2])
    client = MooncakeDistributedStore()
    code = client.setup("127.0.0.1", "P2PHANDSHAKE", segment, 2**25, "tcp", "", master)
    print(json.dumps(code), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(client, *json.loads(line))), flush=True)
    client.close()


main()
