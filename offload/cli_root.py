"""What the commands on a root share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kvstrata.tiers.fs.space.limits import Limits

Root = Annotated[str, typer.Argument(metavar="ROOT", help="The root_dir of the filesystem tier.")]


@contextmanager
def as_owner(root: str, changing: bool) -> Iterator[None]:
    """For root's user: act as the owner of the books, so that servers can use what is made."""
    from kvstrata.tiers.fs.space.walk import BOOKS_NAME

    if not changing or os.geteuid() != 0:
        yield
        return
    books = os.path.join(root, BOOKS_NAME)
    owner = os.stat(books if os.path.exists(books) else root)
    group = os.getegid()
    os.setegid(owner.st_gid)
    os.seteuid(owner.st_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)


def no_namespaces(root: str) -> bool:
    """Say on stderr that there are none; whether that is since `root` is something else.

    Raises:
        OSError: `root` cannot be listed.
    """
    from kvstrata.tiers.fs.space.walk import BOOKS_NAME

    # a fresh ext4 disk has a lost+found
    misplaced = not set(os.listdir(root)) <= {"lost+found", BOOKS_NAME}
    remedy = ": give the root_dir of the fs tier" if misplaced else ""
    typer.echo(f"kvstrata: no namespaces below {root!r}{remedy}", err=True)
    return misplaced


def limits_json(limits: Limits) -> dict[str, int | None]:
    """Limits by option; None is no limit."""
    return {
        "max_bytes": limits.max_bytes or None,
        "max_files": limits.max_files or None,
        "min_free_bytes": limits.min_free_bytes or None,
    }
