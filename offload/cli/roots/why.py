"""`kvstrata ls ROOT --why A B`: in which fields two namespaces differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from kvstrata.offload.cli.printing import fail, print_json, printable
from kvstrata.offload.cli.roots.root import named_namespaces, refuse

if TYPE_CHECKING:
    from kvstrata.tiers.fs.files.differences import Difference

_MOST_SHOWN = 200  # characters of a value


def explain(root: str, asked: tuple[str, str], as_json: bool) -> None:
    """Print the fields in which the two namespaces differ, which `asked` names.

    Raises:
        typer.Exit: with 2: a name fits no namespace or several, or a config.json is not sound.
    """
    from kvstrata.tiers.fs.files.differences import differences
    from kvstrata.tiers.fs.files.namespace import read_config
    from kvstrata.tiers.fs.tools.listing import check_config

    try:
        chosen = named_namespaces(root, asked)
    except OSError as error:
        fail(root, error)
    fields = []
    for paths in chosen:
        if (wrong := check_config(paths)) is not None:
            refuse(f"{paths.config!r} tells no fields: {': '.join(wrong)}")
        try:
            fields.append(read_config(paths.config))
        except (OSError, ValueError) as error:  # it was replaced meanwhile
            refuse(f"{paths.config!r} tells no fields: {error}")
    first, second = fields
    found = differences(second, first)
    names = [paths.name for paths in chosen]
    if as_json:
        print_json({"path": root, "namespaces": names, "differences": [*map(_as_json, found)]})
    else:
        _show(names, found)


def _as_json(difference: Difference) -> dict[str, object]:
    """A value that is absent has no key."""
    from kvstrata.tiers.fs.files.differences import ABSENT

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
