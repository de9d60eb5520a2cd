"""Tables of any benchmark, as plain text."""

from collections.abc import Sequence


def print_table(rows: Sequence[Sequence[str]], words: int) -> None:
    """Print the rows; the first `words` columns begin at the left, the others, numbers, do not."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if place < words else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def shown(value: float | None) -> str:
    """A number for a cell; nothing where there is none."""
    return "" if value is None else f"{value:.2f}"
