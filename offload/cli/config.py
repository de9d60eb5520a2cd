"""`kvstrata config`: every key of a configuration, with its default and what it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvstrata.offload.cli.printing import AsJson, print_json, printable

if TYPE_CHECKING:
    from kvstrata.tiers.options import Option


def option_tables() -> dict[str, Mapping[str, Option]]:
    """The options by key: of the engine, of any tier, and of each type of tier that is there.

    A type that cannot be imported is said on stderr.
    """
    from kvstrata.offload.config.offload_config import OffloadConfig
    from kvstrata.tiers.options import TierConfigError, options_of
    from kvstrata.tiers.registry import TierEntry, tier_class, tier_types

    tables = {"kv_connector_extra_config": OffloadConfig, "secondary_tiers": TierEntry}
    for name in tier_types():
        try:
            tables[name] = tier_class({"type": name}).Options
        except TierConfigError as error:
            typer.echo(f"kvstrata: {error}", err=True)
    return {name: options_of(cls) for name, cls in tables.items()}


def meaning(option: Option) -> str:
    """What the key is, in Markdown."""
    return f"does nothing: {option.help}" if option.idle else option.help


def config(as_json: AsJson = False) -> None:
    """Print the keys of a configuration: the engine's, those of any tier, and of each type of tier.

    To see whether a configuration works, use `kvstrata doctor --config`.
    """
    from kvstrata.tiers.options import plain

    tables = {
        name: [
            {"key": key, "default": plain(option.default), "help": plain(meaning(option))}
            for key, option in options.items()
        ]
        for name, options in option_tables().items()
    }
    if as_json:
        print_json(tables)
        return
    for name, rows in tables.items():
        title = "each entry of secondary_tiers" if name == "secondary_tiers" else name
        table = Table("key", "default", title=title, title_justify="left", box=None)
        table.add_column("meaning", overflow="fold")
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row.values()))
        Console().print(table)
