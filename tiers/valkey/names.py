"""What the values of a namespace are called on a server.

    {<digest>:<key, hex>}:header        what comes before the data in a page's file
    {<digest>:<key, hex>}:data          the data
    {<model>_<digest>}:config           the namespace's fields, as in config.json
    {<model>_<digest>}:distrusted       only where audits found pages that are not the model's

A cluster places a value by what is in the braces: both of a page are on one of its servers.
"""

from __future__ import annotations

from kvstrata.tiers.base import PageKey


def page_name(digest: str, key: PageKey) -> str:
    """What the names of a page's two values begin with, before `:header` and `:data`."""
    return f"{{{digest}:{key.hex()}}}"


def config_name(namespace: str) -> str:
    """Of the namespace that is called `<model>_<digest>`."""
    return f"{{{namespace}}}:config"


def distrust_name(namespace: str) -> str:
    """Of the namespace that is called `<model>_<digest>`."""
    return f"{{{namespace}}}:distrusted"
