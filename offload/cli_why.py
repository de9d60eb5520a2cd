"""`kvstrata ls ROOT --why A B`: in which fields two namespaces differ."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import typer

from kvstrata.offload.cli_root import no_namespaces
from kvstrata.offload.printing import fail, print_json, printable

if TYPE_CHECKING:
    from kvstrata.tiers.fs.differences import Difference
    from kvstrata.tiers.fs.layout import NamespacePaths

_MOST_SHOWN = 200  # characters of a value


def explain(root: str, asked: tuple[str, str], as_json: bool) -> None:
    """Print the fields in which the two namespaces differ, which `asked` names.

    Raises:
        typer.Exit: with 2: a name fits no namespace or several, or a config.json is not sound.
    """
    from kvstrata.tiers.fs.differences import differences
    from kvstrata.tiers.fs.listing import check_config, namespaces
    from kvstrata.tiers.fs.namespace import read_config

    try:
        known = namespaces(os.path.realpath(root))
    except OSError as error:
        fail(root, error)
    if not known:
        no_namespaces(root)
        raise typer.Exit(2)
    chosen = [_named(root, known, name) for name in asked]
    fields = []
    for paths in chosen:
        if (wrong := check_config(paths)) is not None:
            _refuse(f"{paths.config!r} tells no fields: {': '.join(wrong)}")
        try:
            fields.append(read_config(paths.config))
        except (OSError, ValueError) as error:  # it was replaced meanwhile
            _refuse(f"{paths.config!r} tells no fields: {error}")
    first, second = fields
    found = differences(second, first)
    names = [paths.name for paths in chosen]
    if as_json:
        print_json({"path": root, "namespaces": names, "differences": [*map(_as_json, found)]})
    else:
        _show(names, found)


def _named(root: str, known: Sequence[NamespacePaths], asked: str) -> NamespacePaths:
    """The one namespace whose name or digest is, or begins with, `asked`; a path to it will do."""
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
        _refuse(f"{asked!r} fits {len(fits)} namespaces below {root!r}", several)
    _refuse(f"no namespace below {root!r} is called {asked!r}", [paths.name for paths in known])


def _refuse(reason: str, names: Sequence[str] = ()) -> NoReturn:
    """Say why, and which names there are; exit with 2."""
    typer.echo(f"kvstrata: --why: {reason}{':' if names else ''}", err=True)
    for name in names:
        typer.echo(f"    {printable(name)}", err=True)
    raise typer.Exit(2)


def _as_json(difference: Difference) -> dict[str, object]:
    """A value that is absent has no key."""
    from kvstrata.tiers.fs.differences import ABSENT

    values = {"first": difference.theirs, "second": difference.ours}
    present = {name: value for name, value in values.items() if value is not ABSENT}
    return {"field": difference.name, **present}


def _show(names: Sequence[str], found: Sequence[Difference]) -> None:
    for letter, name in zip("AB", names, strict=True):
        typer.echo(f"{letter}  {printable(name)}")
    typer.echo(f"{len(found) or 'no'} field{' differs' if len(found) < 2 else 's differ'}")
    for difference in found:
        typer.echo(f"\n{printable(difference.name)}")
        for letter, text in zip("AB", difference.values(_MOST_SHOWN), strict=True):
            typer.echo(f"    {letter}  {printable(text)}")
