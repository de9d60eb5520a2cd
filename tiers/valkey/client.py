"""The client of the valkey tier: one for each process, which its threads share.

Never in the engine's process: it starts threads, and connects anew in every fork of its process.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from glide_sync import (
    AdvancedGlideClientConfiguration,
    AdvancedGlideClusterClientConfiguration,
    BackoffStrategy,
    Batch,
    ClosingError,
    ClusterBatch,
    ClusterScanCursor,
    ConnectionError,
    GlideClient,
    GlideClientConfiguration,
    GlideClusterClient,
    GlideClusterClientConfiguration,
    GlideError,
    NodeAddress,
    ServerCredentials,
    TimeoutError,
)

from kvstrata.tiers.process.away import Away
from kvstrata.tiers.valkey.config import ValkeyOptions

# Tries again after 0.1, 0.2, 0.4, 0.8 and 1.6 s, and then every 1.6 s, for ever.
_RECONNECT = BackoffStrategy(num_of_retries=4, factor=100, exponent_base=2)
_SILENT = (ClosingError, ConnectionError, TimeoutError)  # glide's own: nobody answered
_SCANNED = 1000  # names that the server looks at in one call


class Client:
    """Asks the server; each call ends within `timeout_s`, or twice that if it must connect first.

    While the server is away most end at once, see `Away`. Whatever the server or the way to it
    says against it is an `OSError`; ENOSPC if it is full.
    """

    def __init__(self, options: ValkeyOptions, *, lazy: bool) -> None:
        """Connect, or when `lazy` with the first call.

        Raises:
            OSError: the server cannot be used, or the file with the password.
        """
        self._options = options
        self._away = Away()
        host, port = options.address
        timeout_ms = max(1, int(options.timeout_s * 1000))
        common: dict[str, Any] = {
            "addresses": [NodeAddress(host, port)],
            "use_tls": options.tls,
            "credentials": _credentials(options),
            "request_timeout": timeout_ms,
            "reconnect_strategy": _RECONNECT,
            "client_name": "kvstrata",
            "lazy_connect": lazy,
        }
        self._client: GlideClient | GlideClusterClient
        with self._asking():
            if options.cluster:
                of_cluster = AdvancedGlideClusterClientConfiguration(connection_timeout=timeout_ms)
                self._client = GlideClusterClient.create(
                    GlideClusterClientConfiguration(advanced_config=of_cluster, **common)
                )
            else:
                advanced = AdvancedGlideClientConfiguration(connection_timeout=timeout_ms)
                self._client = GlideClient.create(
                    GlideClientConfiguration(advanced_config=advanced, **common)
                )

    def batch(self) -> Any:
        """Commands to be sent at once, which others may come between."""
        return (ClusterBatch if self._options.cluster else Batch)(is_atomic=False)

    def run(self, batch: Any) -> list[Any]:
        """What the server answers to each of them."""
        with self._asking():
            answers = self._client.exec(batch, raise_on_error=False) or []
            for each in answers:
                if isinstance(each, GlideError):
                    raise each
        return answers

    def put(self, values: Mapping[bytes, bytes | memoryview], *, replace: bool, ttl_s: int) -> bool:
        """Keep all the values or none; False if one is there and is not to be replaced.

        With `ttl_s` above 0 they leave after so many seconds, also those that were there.
        """
        if not ttl_s:  # a batch of one takes twice as long
            with self._asking():
                put = self._client.mset if replace else self._client.msetnx
                return bool(put(cast(Any, values)))
        batch = self.batch()
        (batch.mset if replace else batch.msetnx)(values)
        for name in values:
            batch.expire(name, ttl_s)
        return bool(self.run(batch)[0])

    def fetch(self, names: Sequence[bytes], buffers: Sequence[memoryview]) -> list[int | None]:
        """Copy the values into the buffers; how long each is, or None if it is not there.

        Raises:
            ValueError: one has no room in its buffer.
            OSError: see the class.
        """
        with self._asking():
            sizes = self._client.mget(list(names), buffers=list(buffers))
        return [None if each is None else int(each) for each in sizes]

    def scan(self, pattern: str) -> Iterator[bytes]:
        """The names of all values that match the glob, some perhaps twice."""
        start: Callable[[], Any] = ClusterScanCursor if self._options.cluster else lambda: b"0"
        cursor, client = start(), cast(Any, self._client)  # one's cursors are not the other's
        while True:
            with self._asking():
                cursor, names = client.scan(cursor, match=pattern, count=_SCANNED)
            yield from names
            if cursor.is_finished() if self._options.cluster else cursor == b"0":
                return

    def close(self) -> None:
        """No further call follows."""
        self._client.close()

    @contextmanager
    def _asking(self) -> Iterator[None]:
        begun = self._away.begin()
        try:
            yield
        except GlideError as error:
            failure = self._failure(error)
            if isinstance(error, _SILENT):
                self._away.silent(begun, failure)
            else:
                self._away.answered()
            raise failure from None
        self._away.answered()

    def _failure(self, error: GlideError) -> Exception:
        text = str(error).strip()
        if "exceeds buffer capacity" in text:
            return ValueError(text)
        code = errno.ENOSPC if text.startswith("OOM") else errno.EIO
        return OSError(code, f"{self._options.url}: {text}")


def _credentials(options: ValkeyOptions) -> ServerCredentials | None:
    """What the file with the password says; no error shows any of it."""
    if options.password_file is None:
        return None
    with open(options.password_file, encoding="utf-8") as file:
        lines = file.read(2**16).splitlines()
    if not 1 <= len(lines) <= 2 or not all(lines):
        raise OSError(errno.EINVAL, "not one line with a password, or two", options.password_file)
    *user, password = lines
    return ServerCredentials(password, user[0] if user else None)
