"""`kvstrata pool`: the pools of this user in shared memory."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from kvstrata.offload.cli.printing import AsJson, age, complain, fail, print_json
from kvstrata.offload.cli.roots.root import books_json, refuse
from kvstrata.tiers.options import format_bytes

pool = typer.Typer(
    help="List the pools of this user in shared memory, and remove one.", no_args_is_help=True
)


@pool.command("ls")
def list_pools(as_json: AsJson = False) -> None:
    """List the pools: what is in each, its budget, who lives on it, and its last use.

    Says so on stderr if there is none. Exits with 2 if a pool cannot be looked at.
    """
    from kvstrata.tiers.pool.place import pool_names, pool_path

    try:
        names = pool_names()
    except OSError as error:
        fail(str(error.filename), error)
    found, worst = [], 0
    for name in names:
        try:
            found.append(_look(name, pool_path(name)))
        except OSError as error:
            complain(pool_path(name), error)
            worst = 2
    if as_json:
        print_json({"pools": found})
    elif not names:
        typer.echo(f"kvstrata: user {os.geteuid()} has no pools", err=True)
    else:
        for each in found:
            _show(each)
    raise typer.Exit(worst)


@pool.command()
def rm(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `pool ls` prints it.")],
) -> None:
    """Remove a pool and give its memory back.

    Exits with 2, and removes nothing, while a server lives on it.
    """
    from kvstrata.tiers.base import TierConfigError
    from kvstrata.tiers.pool.place import parse_name, pool_path
    from kvstrata.tiers.pool.tools import PoolKept, remove_pool

    try:
        remove_pool(parse_name("NAME", name))
    except (PoolKept, TierConfigError) as error:
        refuse(str(error))
    except OSError as error:
        fail(pool_path(name), error)
    typer.echo(f"pool {name} is removed")


def _look(name: str, path: str) -> dict[str, Any]:
    """What `--json` says of a pool.

    Raises:
        OSError: its books cannot be read.
    """
    from kvstrata.tiers.fs.tools.trim import last_uses
    from kvstrata.tiers.pool.place import wrong_pool
    from kvstrata.tiers.pool.tools import living

    nothing = {"counted": None, "files": None, "bytes": None, "max_bytes": None}
    if wrong := wrong_pool(os.lstat(path)):
        unseen = {"servers": 0, "pids": [], "used_age_s": None}
        return {"name": name, "path": path, "wrong": wrong, **nothing, **unseen}
    books = books_json(path)
    if books is None:
        wrong = "has no books that can be read" if os.listdir(path) else "is empty"
    books = books or {}
    used = max(last_uses(path).values(), default=None)
    return {
        "name": name,
        "path": path,
        "wrong": wrong or None,
        **{key: books.get(key) for key in nothing},
        "servers": books.get("servers", 0),
        "pids": list(living(path).pids),
        "used_age_s": None if used is None else max(0.0, time.time() - used),
    }


def _show(found: Mapping[str, Any]) -> None:
    if found["wrong"] is not None:
        typer.echo(f"{found['name']}: {found['path']!r} {found['wrong']}")
        return
    counted = "" if found["counted"] else "not counted yet: "
    most = "" if found["max_bytes"] is None else f" of at most {format_bytes(found['max_bytes'])}"
    pids = f" (processes {', '.join(map(str, found['pids']))})" if found["pids"] else ""
    since = found["used_age_s"]
    used = "never used" if since is None else f"used {age(0.0, since)} ago"
    typer.echo(
        f"{found['name']}: {counted}{found['files']} files, {format_bytes(found['bytes'])}{most}; "
        f"{found['servers']} members{pids}, {used}"
    )
