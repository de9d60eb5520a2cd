"""`kvstrata gc`: trim a root to limits."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from kvstrata.offload.cli.printing import AsJson, fail, print_json, state_bar
from kvstrata.offload.cli.roots.root import Root, free_json, limits_json, no_namespaces, refuse_root
from kvstrata.tiers.options import format_bytes

if TYPE_CHECKING:
    from kvstrata.tiers.fs.budget.limits import Limits, Usage
    from kvstrata.tiers.fs.tools.trim import Trimmed


def gc(
    root: Root,
    max_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help='Most bytes to keep, such as "100GiB".')
    ] = None,
    max_files: Annotated[int | None, typer.Option(metavar="N", help="Most files to keep.")] = None,
    min_free_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help='Bytes, or a share such as "10%", to leave free.'),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Delete the pages that were not used for the longest, until all the limits hold.

    Servers may be running: then one of them deletes. Exits with 1 if the limits cannot be reached,
    with 2 if ROOT cannot be used or an option is wrong.
    """
    from kvstrata.tiers.fs.tools.listing import namespaces
    from kvstrata.tiers.fs.tools.trim import trim

    try:
        if not namespaces(root):
            raise typer.Exit(2 if no_namespaces(root) else 0)
        limits = _limits(root, max_bytes, max_files, min_free_bytes)
        refuse_root(root)
        with state_bar("trimming") as say:
            done = trim(root, limits, say and (lambda *state: say(_progress(*state))))
    except OSError as error:
        fail(root, error)
    if as_json:
        _print_trimmed(done, limits)
    else:
        _show_trimmed(done)
    raise typer.Exit(0 if done.within else 1)


def _limits(
    root: str, max_bytes: str | None, max_files: int | None, min_free_bytes: str | None
) -> Limits:
    """The limits that the options ask for, read as those of the tier are.

    Raises:
        typer.BadParameter: one is wrong, or there is none.
        OSError: the file system cannot be asked.
    """
    from kvstrata.tiers.base import TierConfigError
    from kvstrata.tiers.fs.config import FsConfig
    from kvstrata.tiers.fs.startup import limits_of
    from kvstrata.tiers.machine.disk import disk_at

    given = {"max_bytes": max_bytes, "max_files": max_files, "min_free_bytes": min_free_bytes}
    options = {key: value for key, value in given.items() if value is not None}
    try:
        # no floor but the one that was asked for
        fixed = {"root_dir": os.path.abspath(root), "min_free_bytes": 0}
        (config,) = FsConfig.parse({**fixed, **options})
        limits = limits_of(config)
    except TierConfigError as error:
        raise typer.BadParameter(str(error)) from None
    if not limits:
        raise typer.BadParameter(
            "give at least one limit: --max-bytes, --max-files or --min-free-bytes"
        )
    disk = disk_at(root)
    if disk.bounded and limits.min_free_bytes > disk.total:
        raise typer.BadParameter("min_free_bytes: the file system is smaller than that")
    return limits


def _progress(usage: Usage, deleted: int) -> str:
    return f"{usage.files} files, {format_bytes(usage.nbytes)}; {deleted} deleted here"


def _print_trimmed(done: Trimmed, limits: Limits) -> None:
    before, after = (
        {"files": usage.files, "bytes": usage.nbytes, "free_bytes": free_json(usage.free_bytes)}
        for usage in (done.before, done.after)
    )
    print_json(
        {
            "within": done.within,
            "limits": limits_json(limits),
            "servers": done.members,
            "refused": done.refused,
            "fixed": {"files": done.fixed.files, "bytes": done.fixed.nbytes},
            "evicted_files": done.evicted_files,
            "evicted_bytes": done.evicted_bytes,
            "before": before,
            "after": after,
            "failures": done.failures,
        }
    )


def _show_trimmed(done: Trimmed) -> None:
    before, after = done.before, done.after
    servers, who = "", "by this command"
    if done.members:
        servers = f"members running: {done.members}; "
        who = "by this command and by the member that keeps the books"
    typer.echo(
        f"{servers}from {before.files} files, {format_bytes(before.nbytes)} to {after.files} "
        f"files, {format_bytes(after.nbytes)}; {done.evicted_files} files, "
        f"{format_bytes(done.evicted_bytes)} deleted {who}"
    )
    for cause, count in sorted(done.failures.items()):
        typer.echo(f"failed: {cause}: {count}")
    if done.refused:
        typer.echo(
            "the limits cannot be reached, and nothing was deleted: without any page "
            f"{done.fixed.files} files, {format_bytes(done.fixed.nbytes)} would be left "
            "(the books, foreign files, directories)"
        )
    elif not done.within:
        typer.echo("the limits were not reached: nothing else can be deleted")
