"""Run a benchmark, then hold each figure it appends to its CSV file against the committed one.

    against.py docs/bench/fs.csv .bench/fs.csv COMMAND...

`make bench-fs AGAINST=docs/bench/fs.csv` runs this. It needs the standard library alone, as
`make bench-kernels` may run where there is little else. Exits as the command does, and with 2 if
nothing can be compared.
"""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

LAST_OF_MACHINE = "vllm"  # the column behind which the figure begins
MEASURED = ("value", "without_ms", "with_ms", "ratio", "cached")
LEFT_OUT = ("target",)  # neither measured nor a part of what was


class Ratio(NamedTuple):
    """A figure of now by the committed one. what: who and what was measured, in words."""

    what: str
    now: float
    then: float

    @property
    def value(self) -> float | None:
        """None where the committed figure is 0."""
        return self.now / self.then if self.then else None


def medians(lines: Iterable[str]) -> dict[tuple[str, ...], float]:
    """What was measured, and the median of its lines. `lines` begin with the columns' names.

    Raises:
        ValueError: it is no CSV file of figures.
    """
    reader = csv.DictReader(lines)
    names = list(reader.fieldnames or ())
    if LAST_OF_MACHINE not in names or not set(MEASURED) & set(names):
        raise ValueError(f"has the columns {', '.join(names) or 'of no name'}, so no figures")
    figure = names[names.index(LAST_OF_MACHINE) + 1 :]
    measured = [name for name in figure if name in MEASURED]
    case = [name for name in figure if name not in (*MEASURED, *LEFT_OUT)]
    found: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in reader:
        for name in measured:
            which = () if name == "value" else (name,)
            found[*(row[each] for each in case), *which].append(float(row[name]))
    return {key: statistics.median(values) for key, values in found.items()}


def compare(now: Iterable[str], then: Iterable[str]) -> list[Ratio]:
    """The ratios of all figures that both have, in the order of `now`.

    Raises:
        ValueError: one of them is no CSV file of figures.
    """
    committed = medians(then)
    return [
        Ratio(", ".join(filter(None, key)), value, committed[key])
        for key, value in medians(now).items()
        if key in committed
    ]


def machines(lines: Iterable[str]) -> str:
    """What the figures were measured on."""
    return "; ".join(sorted({row["machine"] for row in csv.DictReader(lines)}))


def main(arguments: Sequence[str]) -> int:
    """See the module; the exit code."""
    then_path, now_path, *command = arguments
    try:
        then = Path(then_path).read_text().splitlines()
        medians(then)
    except (OSError, ValueError) as error:
        print(f"AGAINST={then_path}: {error}; name a file of docs/bench", file=sys.stderr)
        return 2
    path = Path(now_path)
    before = len(path.read_text().splitlines()) if path.exists() else 0
    code = subprocess.run(command).returncode
    lines = path.read_text().splitlines() if path.exists() else []
    now = lines[:1] + lines[max(before, 1) :]
    ratios = compare(now, then) if len(now) > 1 else []
    if not ratios:
        if not code:
            print(f"nothing of this is in {then_path}", file=sys.stderr)
        return code or 2
    print(f"\nby {then_path} ({machines(then)}; here: {machines(now)})")
    print(f"{'ratio':>8} {'now':>12} {'committed':>12}")
    for ratio in ratios:
        shown = "-" if ratio.value is None else f"{ratio.value:.2f}"
        print(f"{shown:>8} {ratio.now:>12.5g} {ratio.then:>12.5g}  {ratio.what}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
