"""Copying from and to a bucket."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kvstrata.offload.cli.copy.host import PlaceHost
from kvstrata.offload.cli.copy.place import UNTRUSTED, Place, PlaceError, Refused, Wrong
from kvstrata.tiers.base import PageKey, TierConfigError, TierContext
from kvstrata.tiers.fs.files.layout import (
    NAMESPACE_DIR,
    PAGE_SUFFIX,
    NamespacePaths,
    located_key,
)
from kvstrata.tiers.fs.files.namespace import parse_config
from kvstrata.tiers.object.bucket import Bucket, BucketError
from kvstrata.tiers.object.config import ObjectConfig
from kvstrata.tiers.object.medium import ObjectMedium
from kvstrata.tiers.object.opening import Opened, open_bucket, unusable
from kvstrata.tiers.page.identity import MAX_CONFIG_BYTES
from kvstrata.tiers.process.medium import Medium


class BucketPlace(Place):
    """Objects below `config.url`."""

    more_room = "free some of the bucket's room, or raise its quota"

    def __init__(self, config: ObjectConfig) -> None:
        self.shown = config.url
        self.config = config
        try:
            self._bucket = Bucket(config)
        except Exception as error:  # obstore's and boto3's have no base in common
            raise PlaceError(unusable(config, error)) from None

    def namespaces(self) -> list[str]:
        """See `Place.namespaces`."""
        folders = {folder.removesuffix("_r0") for folder in self.folders()}
        return sorted(filter(NAMESPACE_DIR.fullmatch, folders))

    def fields(self, name: str) -> Mapping[str, Any]:
        """See `Place.fields`."""
        paths = NamespacePaths("", name)
        with self._asked():
            found = self._bucket.read(paths.config, size=0, most=MAX_CONFIG_BYTES)
            trusted = self._bucket.size(paths.distrust) is None
        where = f"{self.shown}/{paths.config}"
        if not trusted:
            raise self._untrusted(paths)
        if found is None:
            raise Refused(where, "missing")
        raw, size = found
        try:
            if size > MAX_CONFIG_BYTES:
                raise ValueError(f"{size} bytes")
            return parse_config(bytes(raw))
        except ValueError as error:
            raise Refused(where, f"config: {error!s:.200}") from None

    def keys(self, name: str, since: float | None, wrong: Wrong) -> Iterator[PageKey]:
        """See `Place.keys`."""
        paths = NamespacePaths("", name)
        with self._asked():
            for path, written in self._bucket.names(paths.pages):
                location = path.removeprefix(f"{paths.pages}/")
                key = located_key(location)
                if path.startswith(f"{paths.quarantine}/") or not path.endswith(PAGE_SUFFIX):
                    continue
                if since is not None and written < since:
                    continue
                if key is None:
                    wrong(f"{self.shown}/{path}", "key: no page belongs there")
                else:
                    yield key

    def where(self, name: str, key: PageKey) -> str:
        """See `Place.where`."""
        return f"{self.shown}/{NamespacePaths('', name).page(key)}"

    def source(self, name: str, context: TierContext) -> Medium:
        """See `Place.source`."""
        opened = Opened(self.config, NamespacePaths("", name), trusted=True)
        return ObjectMedium(opened, context, PlaceHost(self.shown), False)  # nobody hears a list

    def target(self, context: TierContext) -> Medium:
        """See `Place.target`; opened as the object tier opens it."""
        try:
            opened = open_bucket(self.config, context)
        except TierConfigError as error:
            raise PlaceError(str(error)) from None
        if not opened.trusted:
            raise self._untrusted(opened.paths)
        return ObjectMedium(opened, context, PlaceHost(self.shown), False)

    def overlaps(self, other: Place) -> bool:
        """See `Place.overlaps`."""
        if not isinstance(other, BucketPlace) or self.config.endpoint != other.config.endpoint:
            return False
        one, two = f"{self.config.url}/", f"{other.config.url}/"
        return one.startswith(two) or two.startswith(one)

    def folders(self) -> list[str]:
        """Those below the url."""
        with self._asked():
            return self._bucket.folders()

    def objects(self, folder: str) -> list[tuple[str, float]]:
        """The path of each object in it, and when it was written, in s since the epoch."""
        with self._asked():
            return list(self._bucket.names(folder))

    def remove(self, folder: str) -> None:
        """Delete all objects in it."""
        for path, _ in self.objects(folder):
            with self._asked():
                self._bucket.remove(path)

    def _untrusted(self, paths: NamespacePaths) -> Refused:
        return Refused(f"{self.shown}/{paths.distrust}", UNTRUSTED)

    @contextmanager
    def _asked(self) -> Iterator[None]:
        try:
            yield
        except BucketError as error:
            raise PlaceError(unusable(self.config, error)) from None
