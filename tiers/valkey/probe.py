"""Asks a server what it is, for the tier's start: see `tiers.process.probe`."""

from __future__ import annotations

import socket
from dataclasses import replace

from glide_sync import InfoSection

from kvstrata.tiers.process.probe import answer
from kvstrata.tiers.valkey.client import Client
from kvstrata.tiers.valkey.config import ValkeyOptions

_MOST_BYTES = 512 * 2**20  # of a value, by default; not every server says


def find(asked: tuple[ValkeyOptions, str]) -> dict[str, object]:
    """`is_cluster`, `most_bytes` of a value, and `found`: whether the named value is there.

    Or `wrong`: the option without which the server could be used, perhaps.

    Raises:
        OSError: the server cannot be used, or the file with the password.
    """
    options, name = asked
    try:
        return _find(options, name)
    except OSError:
        if options.tls and _answers_plainly(options):
            return {"wrong": "tls"}
        if options.cluster and not _find(replace(options, cluster=False), name)["is_cluster"]:
            return {"wrong": "cluster"}
        raise


def _answers_plainly(options: ValkeyOptions) -> bool:
    """Whether the server speaks without TLS; what it says does not matter."""
    try:
        with socket.create_connection(options.address, options.timeout_s) as connection:
            connection.settimeout(options.timeout_s)
            connection.sendall(b"PING\r\n")
            return connection.recv(1) in (b"+", b"-")
    except OSError:
        return False


def _find(options: ValkeyOptions, name: str) -> dict[str, object]:
    client = Client(options, lazy=False)
    (about,) = client.run(client.batch().info([InfoSection.CLUSTER]))
    most = _MOST_BYTES
    try:
        (limits,) = client.run(client.batch().config_get(["proto-max-bulk-len"]))
        most = int(limits[b"proto-max-bulk-len"])
    except (OSError, KeyError):
        pass  # hosted servers do not let everybody ask
    is_cluster = b"cluster_enabled:1" in about
    count = 0
    if is_cluster == options.cluster:  # else the question would fail, and not say why
        (count,) = client.run(client.batch().exists([name]))
    return {"is_cluster": is_cluster, "most_bytes": most, "found": bool(count)}


if __name__ == "__main__":
    answer(find)
