"""Asks whether a pool can be used, for the tier's start: see `tiers.process.probe`."""

from __future__ import annotations

from kvstrata.tiers.mooncake.client import Client
from kvstrata.tiers.mooncake.config import MooncakeOptions
from kvstrata.tiers.process.probe import answer


def find(options: MooncakeOptions) -> dict[str, object]:
    """Nothing, if it can; no memory is lent meanwhile.

    Raises:
        OSError: the master cannot be used.
        ImportError: the client's library, or one that it needs, is not installed.
    """
    client = Client(options, segment=0)
    client.connect()
    client.exist(["kvstrata"])
    client.close()
    return {}


if __name__ == "__main__":
    answer(find)
