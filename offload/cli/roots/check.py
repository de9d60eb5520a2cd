"""`kvstrata check`: what is wrong below a root, and putting it right."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from kvstrata.offload.cli.printing import AsJson, byte_bar, fail, print_json, printable
from kvstrata.offload.cli.roots.root import Root, no_namespaces, refuse_root
from kvstrata.tiers.options import format_bytes

if TYPE_CHECKING:
    from kvstrata.tiers.fs.tools.repair import Examination


def check(
    root: Root,
    fix: Annotated[bool, typer.Option("--fix", help="Put right what can be.")] = False,
    as_json: AsJson = False,
) -> None:
    """Verify every file, reading it whole, and the books of the disk budget.

    What servers that were killed left is named, and no damage: the next one that starts there
    cleans it, and --fix does. Exits with 1 if something is wrong and was not repaired, with 2 if
    ROOT is no readable directory, or holds things but no namespace.
    """
    from kvstrata.tiers.fs.tools.listing import list_namespaces, namespaces
    from kvstrata.tiers.fs.tools.repair import examine

    try:
        misplaced = not namespaces(root) and no_namespaces(root)
        if fix:
            refuse_root(root)
        with byte_bar("counting") as advance:
            # only the bar needs the total
            total = sum(each.bytes for each in list_namespaces(root, advance)) if advance else 0
        with byte_bar("checking", total) as advance:
            done = examine(
                root, fix and not misplaced, advance and (lambda report: advance(report.size))
            )
    except OSError as error:
        fail(root, error)
    left = sum(finding.repair is None and not finding.remains for finding in done.findings)
    if as_json:
        _print_examination(done, left)
    elif not misplaced:
        _show_examination(done, left, fix)
    raise typer.Exit(2 if misplaced else 1 if left else 0)


def _print_examination(done: Examination, left: int) -> None:
    from dataclasses import asdict

    report = done.report
    print_json(
        {
            "files": report.files,
            "bytes": report.bytes,
            "temporary": report.temporary,
            "quarantined": report.quarantined,
            "servers": done.members,
            "found": Counter(finding.kind for finding in done.findings),
            "repaired": Counter(f.repair for f in done.findings if f.repair is not None),
            "left": left,
            "remains": sum(f.remains and f.repair is None for f in done.findings),
            "findings": [asdict(finding) for finding in done.findings],
        }
    )


def _show_examination(done: Examination, left: int, fix: bool) -> None:
    """A line for each finding, and the totals."""
    for each in done.findings:
        word = each.repair or ("left by an ended server" if each.remains else "bad")
        typer.echo(f"{word}: {printable(each.path)}: {printable(each.reason)}")
    kinds = Counter(finding.kind for finding in done.findings if not finding.remains)
    parts = [
        f"{done.report.files} files, {format_bytes(done.report.bytes)}",
        f"{kinds.total()} bad",
    ]
    if kinds:
        parts[1] += f" ({', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))})"
    remains = sum(finding.remains for finding in done.findings)
    if remains:
        cleaned = "" if fix else " (the next start, or --fix, cleans it)"
        parts.append(f"{remains} left by ended servers{cleaned}")
    if fix and done.findings:
        repairs = Counter(finding.repair for finding in done.findings if finding.repair)
        parts += [f"{count} {repair}" for repair, count in sorted(repairs.items())]
        parts.append(f"{left} left")
    typer.echo(f"{', '.join(parts)}, {done.report.temporary} temporary")
    if done.members:
        typer.echo(f"members running: {done.members}; the books were left to them")
