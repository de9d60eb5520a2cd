"""Names: where the files of a namespace lie under the root.

<root>/<model>_<digest>/config.json
<root>/<model>_<digest>/distrusted.json    only where audits found pages that are not the model's
<root>/<model>_<digest>_r0/<hhh>/<hh>_g<group>/<hash_hex>.safetensors
<root>/<model>_<digest>_r0/quarantine/
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from kvstrata.tiers.base import key_group, key_hash
from kvstrata.tiers.page.identity import CONFIG_NAME, DISTRUST_NAME, is_key

PAGE_SUFFIX = ".safetensors"
QUARANTINE_NAME = "quarantine"

NAMESPACE_DIR = re.compile(r"(?P<model>.*)_(?P<digest>[0-9a-f]{12})")
PAGES_DIR = re.compile(r"(?P<model>.*)_(?P<digest>[0-9a-f]{12})_r0")

_LOCATION = re.compile(
    r"[0-9a-f]{3}/[0-9a-f]{2}_g(?P<group>[0-9]{1,9})/(?P<hash>([0-9a-f]{2})+)\.safetensors"
)


def page_location(key: bytes) -> str:
    """The page's path below `<model>_<digest>_r0`; `is_key(key)` must hold."""
    name = key_hash(key).hex()
    return f"{name[:3]}/{name[3:5]}_g{key_group(key)}/{name}{PAGE_SUFFIX}"


def located_key(location: str) -> bytes | None:
    """The key of which `location` is the `page_location`; None if there is none."""
    match = _LOCATION.fullmatch(location)
    if match is None:
        return None
    key = bytes.fromhex(match["hash"]) + int(match["group"]).to_bytes(4, "big")
    return key if is_key(key) and page_location(key) == location else None


@dataclass(frozen=True, slots=True)
class NamespacePaths:
    """The paths of one namespace.

    Attributes:
        root: the tier's `root_dir`, absolute.
        name: `<model>_<digest>`.
    """

    root: str
    name: str

    @property
    def home(self) -> str:
        """The directory of config.json."""
        return os.path.join(self.root, self.name)

    @property
    def config(self) -> str:
        """The namespace's config.json."""
        return os.path.join(self.home, CONFIG_NAME)

    @property
    def distrust(self) -> str:
        """Its presence means that no page of the namespace is to be loaded or stored."""
        return os.path.join(self.home, DISTRUST_NAME)

    @property
    def pages(self) -> str:
        """The directory of the pages. One file holds all ranks, hence always rank 0."""
        return f"{self.home}_r0"

    @property
    def quarantine(self) -> str:
        """The directory of files that were found bad."""
        return os.path.join(self.pages, QUARANTINE_NAME)

    def page(self, key: bytes) -> str:
        """The page's file; `is_key(key)` must hold."""
        return os.path.join(self.pages, page_location(key))
