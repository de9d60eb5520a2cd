"""Pages as a pool has them, written and read without the tier."""

from kvstrata.tiers.base import SecondaryTier, TierContext
from kvstrata.tiers.page.identity import namespace_digest
from kvstrata.tiers.testing import CONTEXT
from tests.tiers.fs.test_contract import written_by_the_book
from tests.tiers.mooncake.pool import Peer


def name_of(key: bytes, context: TierContext = CONTEXT) -> str:
    return f"{namespace_digest(context.namespace)}:{key.hex()}"


def whole(key: bytes, data: bytes, context: TierContext = CONTEXT) -> bytes:
    """Header and data."""
    return written_by_the_book(context, namespace_digest(context.namespace), key, data)


class Values:
    """The medium of `TierContract`."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer

    def put(self, tier: SecondaryTier, context: TierContext, key: bytes, data: bytes) -> None:
        assert self.peer.put(name_of(key, context), whole(key, data, context)) == 0

    def get(self, tier: SecondaryTier, context: TierContext, key: bytes) -> bytes | None:
        value = self.peer.get(name_of(key, context))
        if value is None:
            return None
        data = value[-context.layouts[int.from_bytes(key[-4:], "big")].nbytes :]
        assert value == whole(key, data, context)
        return data
