"""The valkey tier: pages in the memory of a Valkey or Redis server, or of a cluster of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

from kvstrata.tiers.base import TierConfigError, TierContext
from kvstrata.tiers.options import format_bytes, parse_options
from kvstrata.tiers.page.identity import directory_name, namespace_digest
from kvstrata.tiers.process.medium import MediumSpec
from kvstrata.tiers.process.probe import ask
from kvstrata.tiers.process.tier import ProcessTier
from kvstrata.tiers.valkey.config import ValkeyOptions
from kvstrata.tiers.valkey.names import distrust_name

# The server does one thing at a time: more threads would only wait longer for their turn.
_THREADS = 4
_OF_ACCESS = ("WRONGPASS", "NOAUTH", "NOPERM", "without any password configured")

logger = logging.getLogger("kvstrata.tiers.valkey")


class ValkeyTier(ProcessTier):
    """Pages as values of a server; for the options see `ValkeyOptions`."""

    medium = "STORAGE"
    locality = "REMOTE"
    Options = ValkeyOptions
    name = "valkey"
    rejects = True

    def __init__(self, options: Mapping[str, Any], context: TierContext) -> None:
        """See `SecondaryTier.__init__`."""
        parsed = parse_options(ValkeyOptions, options, "valkey tier")
        name = directory_name(context.model, namespace_digest(context.namespace))
        self._mark = distrust_name(name)
        server = ask_server(parsed, self._mark)
        check_page(parsed, server.most_bytes, context)
        if server.found:
            logger.error(
                "kvstrata valkey tier: audits found pages of %s at %s that are not what the model "
                "computes: nothing is loaded from there or stored there until you delete the value "
                "%s and restart",
                *(context.model, parsed.url, self._mark),
            )
        factory = "kvstrata.tiers.valkey.medium:ValkeyMedium"
        medium = MediumSpec(factory, parsed, trusted=not server.found, noisy=True)
        super().__init__(context, [medium], _THREADS, _THREADS)

    def how_to_trust(self) -> str:
        """See `SecondaryTier.how_to_trust`."""
        return (
            "Pages that differed were deleted from the server. See why they did, then delete the "
            f"value {self._mark} there, and restart."
        )


class Server(NamedTuple):
    """What a server is.

    Attributes:
        most_bytes: of a value.
        found: whether it has the value that was asked for.
    """

    most_bytes: int
    found: bool


def check_client() -> None:
    """Whether the client is there.

    Raises:
        TierConfigError: it is not.
    """
    if find_spec("glide_sync") is None:
        raise TierConfigError(
            "valkey tier: the package valkey-glide-sync is missing; pip install 'kvstrata[valkey]'"
        )


def ask_server(options: ValkeyOptions, name: str) -> Server:
    """What the server is, and whether it has a value of that name.

    Raises:
        TierConfigError: it cannot be used.
    """
    check_client()
    found = _ask(options, name)
    if found["is_cluster"] and not options.cluster:
        raise TierConfigError(f"cluster: {options.url!r} is a server of a cluster; give true")
    return Server(int(found["most_bytes"]), bool(found["found"]))


def check_page(options: ValkeyOptions, most: int, context: TierContext) -> None:
    """Whether pages fit into values of at most `most` bytes.

    Raises:
        TierConfigError: they do not.
    """
    page_bytes = max(each.nbytes for each in context.layouts.values())
    if page_bytes > most:
        raise TierConfigError(
            f"url: {options.url!r} takes values of {format_bytes(most)} at most, and a page has "
            f"{format_bytes(page_bytes)}; raise its proto-max-bulk-len, or give fewer "
            "blocks_per_chunk"
        )


def _ask(options: ValkeyOptions, name: str) -> dict[str, Any]:
    """What the probe says.

    Raises:
        TierConfigError: the server cannot be used.
    """
    try:
        found = ask("kvstrata.tiers.valkey.probe", (options, name), 4 * options.timeout_s)
    except OSError as failure:
        raise TierConfigError(f"valkey tier: the server cannot be asked ({failure})") from failure
    error = found.get("error", "")
    if options.password_file and options.password_file in error:
        raise TierConfigError(f"password_file: {error}; give a file that can be read")
    if any(each in error for each in _OF_ACCESS):
        raise TierConfigError(
            f"password_file: {options.password_file!r} does not open the server ({error}); give "
            "the file with its password"
        )
    if error:
        raise TierConfigError(
            f"url: {options.url!r} cannot be used ({error}); start the server, or correct url, "
            "cluster and tls"
        )
    return found
