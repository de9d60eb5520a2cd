"""The command `kvstrata`: look at files, and at whether kvstrata would work here.

Commands import what they need when they run, so that each starts at once and `doctor` runs
where something is missing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from kvstrata.offload.inspection import Inspection
    from kvstrata.tiers.fs.scan import FileReport, NamespaceReport

app = typer.Typer(
    help="Look at the files that kvstrata keeps, and at whether it would work here.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_STYLES = {"ok": "green", "warning": "yellow", "problem": "red"}

Root = Annotated[str, typer.Argument(metavar="ROOT", help="The root_dir of the filesystem tier.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def main() -> None:
    """The console script."""
    app(prog_name="kvstrata")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"kvstrata {version('kvstrata')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def inspect(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="A page, config.json, or other file.")
    ],
    as_json: AsJson = False,
) -> None:
    """Say what a file is: its tensors, its key, and whether it is sound.

    Exits with 1 if the file is bad, with 2 if there is none.
    """
    from kvstrata.offload.inspection import inspect as inspect_path

    try:
        found = inspect_path(file)
    except OSError as error:
        _fail(file, error)
    if as_json:
        from dataclasses import asdict

        _print_json({"ok": found.reason is None, **asdict(found)})
    else:
        _show_inspection(found)
    raise typer.Exit(0 if found.reason is None else 1)


@app.command("ls")
def list_root(root: Root, as_json: AsJson = False) -> None:
    """List the namespaces: for which model and settings files are kept, and how many.

    Says so on stderr if there is none. Exits with 2 if ROOT is no readable directory.
    """
    from kvstrata.tiers.fs.scan import list_namespaces

    try:
        namespaces = list_namespaces(root)
        if not namespaces:
            _no_namespaces(root)
    except OSError as error:
        _fail(root, error)
    if as_json:
        _print_json({"namespaces": [_namespace_json(each) for each in namespaces]})
    else:
        _show_namespaces(namespaces)


@app.command()
def check(root: Root, as_json: AsJson = False) -> None:
    """Verify every file, reading it whole.

    Exits with 1 if a file is bad, with 2 if ROOT is no readable directory, or holds things but
    no namespace.
    """
    from kvstrata.tiers.fs.scan import check_root

    misplaced = False

    try:
        with _progress(root, shown=not as_json and sys.stderr.isatty()) as advance:
            report = check_root(root, advance)
        if not report.namespaces:
            misplaced = _no_namespaces(root)
    except OSError as error:
        _fail(root, error)
    bad_files = [
        {"path": bad.path, "reason": f"{bad.cause}: {bad.detail}"}
        for bad in sorted(report.bad, key=lambda bad: bad.path)
    ]
    if as_json:
        totals = {"files": report.files, "bytes": report.bytes, "bad": len(report.bad)}
        _print_json({**totals, "temporary": report.temporary, "bad_files": bad_files})
    elif not misplaced:
        for bad in bad_files:
            typer.echo(f"bad: {_printable(bad['path'])}: {_printable(bad['reason'])}")
        typer.echo(
            f"{report.files} files, {_size(report.bytes)}, {len(report.bad)} bad, "
            f"{report.temporary} temporary"
        )
    raise typer.Exit(2 if misplaced else 1 if report.bad else 0)


@app.command()
def doctor(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="The root_dir of the filesystem tier to be.")
    ] = ".",
    as_json: AsJson = False,
) -> None:
    """Say what would work here, what not, and why.

    Exits with 1 if kvstrata could not run at all.
    """
    from dataclasses import asdict

    from kvstrata.offload.doctor import PROBLEM, examine

    checks = list(examine(path))
    problems = [check.name for check in checks if check.status == PROBLEM]
    if as_json:
        _print_json({"ok": not problems, "checks": [asdict(check) for check in checks]})
    else:
        table = Table(box=None, show_header=False, pad_edge=False)
        for check in checks:
            status = Text(check.status, style=_STYLES[check.status])
            cells = (check.name, check.found, check.meaning)
            table.add_row(status, *(Text(_printable(cell)) for cell in cells))
        Console().print(table)
        cannot = f"kvstrata cannot run here: {', '.join(problems)}"
        typer.echo(cannot if problems else "kvstrata can run here")
    raise typer.Exit(1 if problems else 0)


def _show_inspection(found: Inspection) -> None:
    """One line per fact, then the tensors."""
    facts = {
        "what": found.kind,
        "bytes": f"{found.bytes} ({_size(found.bytes)})",
        "key": found.key,
        "group": found.group,
        "tokens": found.tokens,
        "namespace": found.namespace,
        "data offset": found.data_offset,
        "checksum": found.checksum or ("not compared" if found.key else None),
        "verdict": "ok" if found.reason is None else f"bad: {found.reason}",
    }
    for tensor in found.tensors:
        shape = f"[{', '.join(map(str, tensor.shape))}]"
        facts[f"tensor {tensor.name}"] = f"{tensor.dtype} {shape}, {tensor.bytes} bytes"
    for name, value in (found.fields or {}).items():
        facts[f"field {name}"] = json.dumps(value)
    width = max(len(_printable(name)) for name in facts)
    for name, value in facts.items():
        if value is not None:
            typer.echo(f"{_printable(name):{width}}  {_printable(str(value))}")


def _show_namespaces(namespaces: list[NamespaceReport]) -> None:
    """Three lines each: the name, the main fields, the files."""
    now = time.time()
    for each in namespaces:
        settings = "its config.json is missing or unreadable"
        if (fields := each.fields) is not None:
            settings = (
                f"KV dtype {fields.get('kv_dtype')!s:.40}, tokens per chunk "
                f"{_tokens(fields)}, weights {fields.get('weights')!s:.12}"
            )
        files = f"{each.files} files, {_size(each.bytes)}"
        if each.oldest is not None and each.newest is not None:
            ages = f"{_age(each.oldest, now)} ago, the newest {_age(each.newest, now)} ago"
            files += f", the oldest written {ages}"
        others = f"{each.temporary} temporary, {each.quarantined} quarantined"
        typer.echo(f"{_printable(each.model)} {each.digest}")
        typer.echo(f"    {_printable(settings)}")
        typer.echo(f"    {files}; {others}")


def _tokens(fields: Mapping[str, Any]) -> str:
    """Tokens per chunk of each group, where config.json tells."""
    from kvstrata.tiers.base import layouts_from_json

    try:
        layouts = layouts_from_json(fields["pages"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return "unknown"
    return ", ".join(str(tokens) for tokens in sorted({x.tokens for x in layouts.values()}))


def _namespace_json(report: NamespaceReport) -> dict[str, Any]:
    now = time.time()
    ages = [None if t is None else max(0.0, now - t) for t in (report.oldest, report.newest)]
    return {
        "model": report.model,
        "digest": report.digest,
        "path": report.path,
        "files": report.files,
        "bytes": report.bytes,
        "temporary": report.temporary,
        "quarantined": report.quarantined,
        "oldest_age_s": ages[0],
        "newest_age_s": ages[1],
        "fields": report.fields,
    }


@contextmanager
def _progress(root: str, shown: bool) -> Iterator[Callable[[FileReport], None] | None]:
    """A bar on stderr over the bytes below `root`; yields what is to be called for each file."""
    if not shown:
        yield None
        return
    from kvstrata.tiers.fs.scan import list_namespaces

    columns = (TextColumn("checking"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=sum(each.bytes for each in list_namespaces(root)))
        yield lambda report: bar.advance(task, report.size)


def _age(when: float, now: float) -> str:
    """From `when` to `now`, both in seconds since the epoch: `3 min`."""
    seconds = max(0.0, now - when)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _size(nbytes: int) -> str:
    from kvstrata.offload.doctor import size_text

    return size_text(nbytes)


def _printable(text: str) -> str:
    """`text` without what could control a terminal: files and their names are anybody's work."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2))


def _no_namespaces(root: str) -> bool:
    """Say on stderr that there are none; whether that is since `root` is something else.

    Raises:
        OSError: `root` cannot be listed.
    """
    misplaced = not set(os.listdir(root)) <= {"lost+found"}  # which a fresh ext4 disk has
    remedy = ": give the root_dir of the fs tier" if misplaced else ""
    typer.echo(f"kvstrata: no namespaces below {root!r}{remedy}", err=True)
    return misplaced


def _fail(path: str, error: OSError) -> NoReturn:
    typer.echo(f"kvstrata: {path!r}: {error.strerror or error}", err=True)
    raise typer.Exit(2)
