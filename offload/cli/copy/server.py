"""Copying from and to a Valkey or Redis server."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from kvstrata.offload.cli.copy.host import PlaceHost
from kvstrata.offload.cli.copy.place import UNTRUSTED, Place, PlaceError, Refused, Wrong
from kvstrata.tiers.base import PageKey, TierConfigError, TierContext
from kvstrata.tiers.fs.files.layout import NAMESPACE_DIR
from kvstrata.tiers.fs.files.namespace import parse_config
from kvstrata.tiers.page.identity import (
    MAX_CONFIG_BYTES,
    directory_name,
    is_key,
    namespace_digest,
)
from kvstrata.tiers.process.medium import Medium
from kvstrata.tiers.valkey.client import Client
from kvstrata.tiers.valkey.config import ValkeyOptions
from kvstrata.tiers.valkey.medium import ValkeyMedium
from kvstrata.tiers.valkey.names import config_name, distrust_name, page_name
from kvstrata.tiers.valkey.tier import ask_server, check_page

_PAGE = re.compile(r"\{([0-9a-f]{12}):(([0-9a-f]{2})+)\}:data")


class ServerPlace(Place):
    """Values of the server at `options.url`."""

    more_room = "raise the server's maxmemory, or give it a maxmemory-policy that evicts"

    def __init__(self, options: ValkeyOptions) -> None:
        self.shown = options.url
        self.options = options
        try:
            self._most_bytes = ask_server(options, config_name("")).most_bytes
        except TierConfigError as error:
            raise PlaceError(str(error)) from None
        self._client = Client(options, lazy=True)

    def namespaces(self) -> list[str]:
        """See `Place.namespaces`; without those whose fields are not there."""
        with self._asked():
            found = {name.decode(errors="replace") for name in self._client.scan(config_name("*"))}
        names = {name.removeprefix("{").removesuffix("}:config") for name in found}
        return sorted(filter(NAMESPACE_DIR.fullmatch, names))

    def fields(self, name: str) -> Mapping[str, Any]:
        """See `Place.fields`."""
        where = config_name(name)
        batch = self._client.batch()
        batch.get(where)
        batch.exists([distrust_name(name)])
        with self._asked():
            raw, distrusted = self._client.run(batch)
        if distrusted:
            raise self._refused(name)
        try:
            if raw is None or len(raw) > MAX_CONFIG_BYTES:
                raise ValueError("missing" if raw is None else f"{len(raw)} bytes")
            return parse_config(raw)
        except ValueError as error:
            raise Refused(f"{self.shown} {where}", f"config: {error!s:.200}") from None

    def keys(self, name: str, since: float | None, wrong: Wrong) -> Iterator[PageKey]:
        """See `Place.keys`; nobody knows when they were written."""
        if since is not None:
            raise PlaceError(f"--newer: {self.shown} does not know when a page was written")
        digest = name[-12:]
        seen: set[PageKey] = set()
        with self._asked():
            for value in self._client.scan(page_name(digest, b"").replace("}", "*}:data")):
                match = _PAGE.fullmatch(value.decode(errors="replace"))
                key = bytes.fromhex(match[2]) if match is not None and match[1] == digest else b""
                if not is_key(key):
                    wrong(f"{self.shown} {value!r:.200}", "key: no page is called so")
                elif key not in seen:
                    seen.add(key)
                    yield key

    def where(self, name: str, key: PageKey) -> str:
        """See `Place.where`."""
        return f"{self.shown} {page_name(name[-12:], key)}"

    def source(self, name: str, context: TierContext) -> Medium:
        """See `Place.source`."""
        return ValkeyMedium(self.options, context, PlaceHost(self.shown), True)

    def target(self, context: TierContext) -> Medium:
        """See `Place.target`."""
        name = directory_name(context.model, namespace_digest(context.namespace))
        try:
            if ask_server(self.options, distrust_name(name)).found:
                raise self._refused(name)
            check_page(self.options, self._most_bytes, context)
        except TierConfigError as error:
            raise PlaceError(str(error)) from None
        return ValkeyMedium(self.options, context, PlaceHost(self.shown), False)

    def overlaps(self, other: Place) -> bool:
        """See `Place.overlaps`."""
        return isinstance(other, ServerPlace) and self.options.address == other.options.address

    def remove(self, name: str, keys: Sequence[PageKey]) -> None:
        """Delete these pages of the namespace, and its fields."""
        pages = (page_name(name[-12:], key) for key in keys)
        values = [f"{page}:{part}" for page in pages for part in ("header", "data")]
        batch = self._client.batch()
        batch.unlink([config_name(name), *values])
        with self._asked():
            self._client.run(batch)

    def _refused(self, name: str) -> Refused:
        return Refused(f"{self.shown} {distrust_name(name)}", UNTRUSTED)

    @contextmanager
    def _asked(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PlaceError(error.strerror or str(error)) from None
