"""A place that pages can be copied from and to: what a directory, a bucket and a server share.

Bytes move through the media of the tiers, so that all is verified, named and written as a tier does
it. What a place adds is to list what is there, and to open it without an engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from kvstrata.tiers.base import PageKey, SecondaryTier, TierContext, layouts_from_json
from kvstrata.tiers.page.identity import namespace_digest
from kvstrata.tiers.process.medium import Medium

UNTRUSTED = "audits found pages there that are not the model's"

Wrong = Callable[[str, str], None]  # is told where something is, and what is wrong with it


class PlaceError(Exception):
    """The place cannot be used; the text says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Refused(Exception):
    """A namespace cannot be copied.

    Attributes:
        where: its path in the place.
        reason: why not.
    """

    where: str
    reason: str


class Place(ABC):
    """Pages by namespace. All methods block, and raise `PlaceError` where nothing can be done.

    Attributes:
        shown: the place as its user names it.
        page_causes: what may be wrong with a page here and not with the place.
        more_room: what to do where a page finds no room.
    """

    shown: str
    more_room: ClassVar[str]
    page_causes: frozenset[str] = SecondaryTier.page_causes

    @abstractmethod
    def namespaces(self) -> list[str]:
        """The names, `<model>_<digest>`, sorted."""

    @abstractmethod
    def fields(self, name: str) -> Mapping[str, Any]:
        """What the namespace's config.json says.

        Raises:
            Refused: it is missing or unreadable, or audits took the namespace out of service.
        """

    @abstractmethod
    def keys(self, name: str, since: float | None, wrong: Wrong) -> Iterator[PageKey]:
        """The keys of the namespace's pages, without reading them.

        Args:
            since: of those alone that were written from then on, in seconds since the epoch.
            wrong: is told of what looks like a page and lies in no page's place.
        """

    @abstractmethod
    def where(self, name: str, key: PageKey) -> str:
        """The page's path, for people."""

    @abstractmethod
    def source(self, name: str, context: TierContext) -> Medium:
        """Loads the namespace's pages, and changes nothing."""

    @abstractmethod
    def target(self, context: TierContext) -> Medium:
        """Stores pages of the namespace, which is made where it is missing.

        Raises:
            Refused: audits took it out of service here.
        """

    @abstractmethod
    def overlaps(self, other: Place) -> bool:
        """Whether one of the two is, or lies in, the other."""


def context_of(where: str, name: str, fields: Mapping[str, Any]) -> TierContext:
    """What a tier would be told of the namespace that has these fields.

    Raises:
        Refused: they are not those of the name's digest, or do not say what a page is.
    """
    model, _, digest = name.rpartition("_")
    try:
        found = namespace_digest(fields)
        layouts = layouts_from_json(fields["pages"])
        sizes = [layout.nbytes for layout in layouts.values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(where, f"config: it does not say what a page is ({error!r:.100})") from None
    if found != digest:
        raise Refused(where, f"config: its fields have the digest {found}")
    if not all(sizes):
        raise Refused(where, "config: it has pages without bytes")
    return TierContext(model, fields, layouts)
