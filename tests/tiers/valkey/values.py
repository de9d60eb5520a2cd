"""Pages as a server has them, written and read without the tier."""

from kvstrata.tiers.base import SecondaryTier, TierContext
from kvstrata.tiers.page.identity import namespace_digest
from kvstrata.tiers.testing import CONTEXT
from tests.tiers.fs.test_contract import written_by_the_book
from tests.tiers.valkey.server import Server


def names(key: bytes, context: TierContext = CONTEXT) -> tuple[str, str]:
    """Of the header's value and of the data's."""
    name = f"{{{namespace_digest(context.namespace)}:{key.hex()}}}"
    return f"{name}:header", f"{name}:data"


class Values:
    """The medium of `TierContract`."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def put(self, tier: SecondaryTier, context: TierContext, key: bytes, data: bytes) -> None:
        whole = written_by_the_book(context, namespace_digest(context.namespace), key, data)
        header, rest = names(key, context)
        self.server.ask("MSET", header, whole[: -len(data)], rest, data)

    def get(self, tier: SecondaryTier, context: TierContext, key: bytes) -> bytes | None:
        header, data = self.server.ask("MGET", *names(key, context))
        if header is None and data is None:
            return None
        assert isinstance(data, bytes)
        whole = written_by_the_book(context, namespace_digest(context.namespace), key, data)
        assert header + data == whole
        return data
