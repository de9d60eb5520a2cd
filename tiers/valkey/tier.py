"""The valkey tier: pages in the memory of a Valkey or Redis server, or of a cluster of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from kvstrata.tiers.base import TierConfigError, TierContext
from kvstrata.tiers.options import format_bytes, parse_options
from kvstrata.tiers.page.identity import directory_name, namespace_digest
from kvstrata.tiers.process.medium import MediumSpec
from kvstrata.tiers.process.probe import ask, check_client
from kvstrata.tiers.process.tier import ProcessTier
from kvstrata.tiers.valkey.config import ValkeyOptions
from kvstrata.tiers.valkey.names import distrust_name

# The server does one thing at a time: more threads would only wait longer for their turn.
_THREADS = 4
_OF_ACCESS = ("WRONGPASS", "NOAUTH", "NOPERM", "without any password configured")
_NOT_LINES = "not one line with a password"  # of the client's
# What the probe found to be wrong.
_WRONG = {
    "cluster": "cluster: true is wrong: {!r} is a server of its own; give false",
    "tls": "tls: true is wrong: {!r} does not encrypt; give false, or set up TLS there",
}

logger = logging.getLogger("kvstrata.tiers.valkey")


class ValkeyTier(ProcessTier):
    """Pages as values of a server; for the options see `ValkeyOptions`."""

    medium = "STORAGE"
    locality = "REMOTE"
    Options = ValkeyOptions
    name = "valkey"
    rejects = True

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """See `SecondaryTier.check_options`; the client must be there."""
        parse(options)

    def __init__(self, options: Mapping[str, Any], context: TierContext) -> None:
        """See `SecondaryTier.__init__`."""
        parsed = parse(options)
        name = directory_name(context.model, namespace_digest(context.namespace))
        self._mark = distrust_name(name)
        server = ask_server(parsed, self._mark)
        check_page(parsed, server.most_bytes, context)
        _look_at_mode(parsed.password_file)
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


def parse(options: Mapping[str, Any]) -> ValkeyOptions:
    """Check the options, and whether the client is there.

    Raises:
        TierConfigError: one is wrong, or it is not.
    """
    parsed = parse_options(ValkeyOptions, options, "valkey tier")
    check_client("valkey", "glide_sync", "valkey-glide-sync")
    return parsed


def ask_server(options: ValkeyOptions, name: str) -> Server:
    """What the server is, and whether it has a value of that name.

    Raises:
        TierConfigError: it cannot be used.
    """
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
    if wrong := found.get("wrong"):
        raise TierConfigError(_WRONG[wrong].format(options.url))
    error = found.get("error", "")
    if options.password_file and options.password_file in error and _NOT_LINES in error:
        raise TierConfigError(
            f"password_file: {error}; give one line with the password, or two with the user's "
            "name and the password"
        )
    if options.password_file and options.password_file in error:
        raise TierConfigError(f"password_file: {error}; give a file that can be read")
    if options.password_file is None and "NOAUTH" in error:
        raise TierConfigError(
            f"password_file is missing: {options.url!r} needs a password ({error}); give the "
            "absolute path of a file that holds it"
        )
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


def _look_at_mode(password_file: str | None) -> None:
    """Warn of a file with a password that is open to others."""
    with suppress(OSError):  # it was read a moment ago
        mode = os.stat(password_file).st_mode & 0o777 if password_file else 0
        if mode & 0o077:
            logger.warning(
                "kvstrata valkey tier: password_file: %r is open to other users (mode %04o); give "
                "it mode 0600",
                *(password_file, mode),
            )
