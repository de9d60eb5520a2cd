"""What the commands on a root share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from kvstrata.offload.cli.printing import printable

if TYPE_CHECKING:
    from kvstrata.tiers.fs.budget.limits import Limits
    from kvstrata.tiers.fs.files.layout import NamespacePaths

Root = Annotated[str, typer.Argument(metavar="ROOT", help="The root_dir of the filesystem tier.")]


def refuse_root(root: str) -> None:
    """Exit with 2 if this is root's user and the books, or `root`, belong to another.

    What root creates there the servers could not use. Other users are stopped by the permissions.

    Raises:
        OSError: `root` cannot be looked at.
    """
    from kvstrata.tiers.fs.budget.ledger import BOOKS_NAME

    books = os.path.join(root, BOOKS_NAME)
    found = os.stat(books if os.path.exists(books) else root)
    owner = found.st_uid
    if os.geteuid() == 0 != owner:
        user = f"setpriv --reuid={owner} --regid={found.st_gid} --clear-groups"
        remedy = f"run this as the servers do, for example with: {user}"
        typer.echo(f"kvstrata: {root!r} belongs to user {owner}; {remedy}", err=True)
        raise typer.Exit(2)


def no_namespaces(root: str) -> bool:
    """Say on stderr that there are none; whether that is since `root` is something else.

    Raises:
        OSError: `root` cannot be listed.
    """
    from kvstrata.tiers.fs.budget.ledger import BOOKS_NAME

    # a fresh ext4 disk has a lost+found
    misplaced = not set(os.listdir(root)) <= {"lost+found", BOOKS_NAME}
    remedy = ": give the root_dir of the fs tier" if misplaced else ""
    typer.echo(f"kvstrata: no namespaces below {root!r}{remedy}", err=True)
    return misplaced


def free_json(free_bytes: int) -> int | None:
    """Free bytes; None where the file system does not tell."""
    from kvstrata.tiers.machine.disk import UNBOUNDED

    return None if free_bytes == UNBOUNDED else free_bytes


def limits_json(limits: Limits) -> dict[str, int | None]:
    """Limits by option; None is no limit."""
    return {name: bound or None for name, bound in limits._asdict().items()}


def books_json(root: str) -> dict[str, Any] | None:
    """What the books of the disk budget say; None where there are none, or they are closed.

    Raises:
        OSError: the file system cannot be asked.
    """
    from kvstrata.tiers.fs.tools.audit import audit

    try:
        found = audit(root)
    except PermissionError:
        return None
    if (books := found.books) is None:
        return None
    usage, limits = books.taken(root), books.limits()
    return {
        "counted": books.known,
        "files": usage.files,
        "bytes": usage.nbytes,
        "reserved_bytes": sum(row.reserved_bytes for row in books.rows.values()),
        "free_bytes": free_json(usage.free_bytes),
        **limits_json(limits),
        "servers": len(found.living),
        "keeper": books.keeper.hex() if books.keeper in found.living else None,
        "damage": [damage.reason for damage in found.damage if not damage.remains],
    }


def named_namespaces(root: str, asked: Sequence[str]) -> list[NamespacePaths]:
    """For each of `asked` the one namespace whose name or digest is, or begins with, it; a path to
    it will do.

    Raises:
        typer.Exit: with 2: there are none, or it fits none or several.
        OSError: `root` cannot be listed.
    """
    from kvstrata.tiers.fs.tools.listing import namespaces

    known = namespaces(os.path.realpath(root))
    if not known:
        no_namespaces(root)
        raise typer.Exit(2)
    return [_named_namespace(root, known, name) for name in asked]


def _named_namespace(root: str, known: Sequence[NamespacePaths], asked: str) -> NamespacePaths:
    wanted = os.path.basename(asked.rstrip("/")).removesuffix("_r0")
    exact = [paths for paths in known if paths.name == wanted]
    fits = exact or [
        paths
        for paths in known
        if wanted and (paths.name.startswith(wanted) or paths.name[-12:].startswith(wanted))
    ]
    if len(fits) == 1:
        return fits[0]
    several = [paths.name for paths in fits]
    if several:
        refuse(f"{asked!r} fits {len(fits)} namespaces below {root!r}", several)
    refuse(f"no namespace below {root!r} is called {asked!r}", [paths.name for paths in known])


def refuse(reason: str, names: Sequence[str] = ()) -> NoReturn:
    """Say why, and which names there are; exit with 2."""
    typer.echo(f"kvstrata: {reason}{':' if names else ''}", err=True)
    for name in names:
        typer.echo(f"    {printable(name)}", err=True)
    raise typer.Exit(2)
