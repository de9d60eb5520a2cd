"""Asks a server what it is: `python -m kvstrata.tiers.valkey.probe`, for the tier's start.

A process of its own, for the engine's is to load no client. It reads pickled `ValkeyOptions` and
the name of a value. Its last line is the answer as JSON: `{"error": ...}`, or `{"is_cluster": ...,
"most_bytes": ..., "found": ...}`, the last of which is whether the value is there.
"""

from __future__ import annotations

import json
import pickle
import sys

from glide_sync import InfoSection

from kvstrata.tiers.valkey.client import Client
from kvstrata.tiers.valkey.config import ValkeyOptions

_MOST_BYTES = 512 * 2**20  # of a value, by default; not every server says


def ask(options: ValkeyOptions, name: str) -> dict[str, object]:
    """See the module's text.

    Raises:
        OSError: the server cannot be used, or the file with the password.
    """
    client = Client(options, lazy=False)
    (about,) = client.run(client.batch().info([InfoSection.CLUSTER]))
    most = _MOST_BYTES
    try:
        (limits,) = client.run(client.batch().config_get(["proto-max-bulk-len"]))
        most = int(limits[b"proto-max-bulk-len"])
    except (OSError, KeyError):
        pass  # hosted servers do not let everybody ask
    is_cluster = b"cluster_enabled:1" in about
    found = 0
    if is_cluster == options.cluster:  # else the question would fail, and not say why
        (found,) = client.run(client.batch().exists([name]))
    return {"is_cluster": is_cluster, "most_bytes": most, "found": bool(found)}


def main() -> None:
    """See the module's text."""
    options, name = pickle.load(sys.stdin.buffer)
    try:
        answer = ask(options, name)
    except OSError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
