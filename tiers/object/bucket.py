"""A bucket, as far as pages need one, and the words for what goes wrong with it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import chain
from typing import Any

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import from_url

from kvstrata.tiers.object.config import ObjectConfig
from kvstrata.tiers.process.away import Away
from kvstrata.tiers.process.medium import MoveError

SILENT = "unreachable"  # the cause of a request to which nobody answered
NOBODY = "no-credentials"  # of a request for which none were found
# Where clouds give them to machines; it is asked last.
_MACHINES_OWN = re.compile(r"//(?:169\.254\.169\.254|metadata\.google\.internal)\b")
_DENIED = re.compile(r"\bstatus(?: code)?:? (?:401|403)\b")
_LISTED = 1000  # at a time; no more come with one answer
_MOST_RETRIES = 3
_FIRST_RETRY_S = 0.1


class BucketError(MoveError):
    """The bucket did not do what it was asked for."""


def open_store(config: ObjectConfig) -> Any:
    """obstore's store for these options, made without touching the bucket.

    A server that is silent costs one `timeout_s`, and one that refuses at most two: no retry begins
    later than one after the first try.

    Raises:
        Exception: of obstore or boto3; the options or the environment are wrong.
    """
    duration = timedelta(seconds=config.timeout_s)
    place = {"s3": "endpoint", "gcs": "base_url", "azure": "endpoint"}[config.store]
    named = {place: config.endpoint, "region": config.region}
    settings: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    options: dict[str, Any] = {
        "config": settings,
        "client_options": {
            "timeout": duration,
            "connect_timeout": duration,
            "allow_http": (config.endpoint or _usual_endpoint()).startswith("http://"),
        },
        "retry_config": {
            "max_retries": _MOST_RETRIES,
            "retry_timeout": duration,
            "backoff": {"init_backoff": timedelta(seconds=_FIRST_RETRY_S)},
        },
    }
    if config.store == "s3":
        # The page has a checksum of its own: SHA-256 would double the CPU time of a store.
        settings["unsigned_payload"] = True
        if _has_profile():
            from obstore.auth.boto3 import Boto3CredentialProvider

            options["credential_provider"] = Boto3CredentialProvider()
    return from_url(config.url, **options)


def _usual_endpoint() -> str:
    """That of the environment, which obstore looks up itself."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return next(filter(None, map(os.environ.get, names)), "")


def _has_profile() -> bool:
    """Whether the credentials are those of a profile, which obstore itself does not read."""
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return False
    shared = os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")
    return "AWS_PROFILE" in os.environ or os.path.exists(os.path.expanduser(shared))


class Bucket:
    """The objects below the url's prefix, by relative path. A method may raise `BucketError`."""

    def __init__(self, config: ObjectConfig) -> None:
        self._store = open_store(config)
        self._away = Away()

    def size(self, path: str) -> int | None:
        """Bytes of the object; None if there is none."""
        with self._asking():
            try:
                return int(self._store.head(path)["size"])
            except FileNotFoundError:
                return None

    def read(self, path: str, size: int, most: int) -> tuple[memoryview, int] | None:
        """The object if it has `size` bytes, else at most its first `most`; and how many it has.

        None if there is none.
        """
        with self._asking():
            try:
                found = self._store.get(path)
                length = int(found.meta["size"])
                if length == size:
                    return memoryview(found.bytes()), length
                start = (
                    self._store.get_range(path, start=0, end=min(length, most)) if length else b""
                )
                return memoryview(start), length
            except FileNotFoundError:
                return None

    def write(self, path: str, whole: bytes, *, replace: bool) -> bool:
        """Keep the object, whole or not at all; False if one is there and is not to be replaced."""
        mode = "overwrite" if replace else "create"
        with self._asking():
            try:
                self._store.put(path, whole, mode=mode, use_multipart=False)
                return True
            except AlreadyExistsError:
                return False

    def move(self, path: str, target: str) -> bool:
        """Give the object another name; False if there is none."""
        with self._asking():
            try:
                self._store.rename(path, target)
                return True
            except FileNotFoundError:
                return False

    def names(self, folder: str) -> Iterator[tuple[str, float]]:
        """The path of each object in a folder, and when it was written, in s since the epoch."""
        for found in chain.from_iterable(self._listed(folder)):
            yield str(found["path"]), found["last_modified"].timestamp()

    def sizes(self, folder: str) -> Iterator[list[tuple[str, int]]]:
        """The path of each object in a folder, and its bytes, as many at a time as are listed."""
        for batch in self._listed(folder):
            yield [(str(found["path"]), int(found["size"])) for found in batch]

    def _listed(self, folder: str) -> Iterator[Any]:
        with self._asking():
            yield from self._store.list(folder, chunk_size=_LISTED)

    def remove(self, path: str) -> None:
        """Delete the object, if there is one."""
        with self._asking(), suppress(FileNotFoundError):
            self._store.delete(path)

    def folders(self) -> list[str]:
        """The first parts of the names of all objects that have more than one."""
        with self._asking():
            return [
                str(each) for each in obstore.list_with_delimiter(self._store)["common_prefixes"]
            ]

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """What obstore says, as a `BucketError`."""
        begun = self._away.begin()
        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            failure = BucketError(_cause(error), plain_text(error))
            if failure.cause in (SILENT, NOBODY):
                self._away.silent(begun, failure)
            else:
                self._away.answered()
            raise failure from None
        self._away.answered()


def _cause(error: Exception) -> str:
    text = str(error)
    if _MACHINES_OWN.search(text):
        return NOBODY
    denied = isinstance(error, PermissionDeniedError | UnauthenticatedError)
    if denied or _DENIED.search(text):  # a list's has no class of its own
        return "denied"
    # without a status nobody answered, or not to the end
    return SILENT if "HTTP error:" in text else "io-error"


def plain_text(error: Exception) -> str:
    """What an error of obstore's says, in one line.

    Without the query of a url, which may be a signature, and of what the server said without all
    but code and message: S3 repeats the request and who made it.
    """
    text, _, said = str(error).partition("\n\nDebug source")[0].partition("<?xml")
    words = [word.partition("?")[0] if "://" in word else word for word in text.split()]
    return " ".join((*words, *re.findall("<(?:Code|Message)>([^<]*)</", said)))
