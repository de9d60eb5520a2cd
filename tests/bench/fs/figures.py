"""What is measured of a filesystem tier."""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    """One number, the median of its repetitions.

    Attributes:
        contestant: who was measured.
        operation: what it did.
        shape: how the work was cut, for example into jobs of how many pages.
        engine: "idle", or "busy" when a Python thread was spinning in the calling process.
        page_bytes: size of a page; 0 where pages play no part.
        metric: what `value` is, with its unit.
        value: the number.
    """

    contestant: str
    operation: str
    shape: str
    engine: str
    page_bytes: int
    metric: str
    value: float

    @property
    def case(self) -> str:
        """What was measured, in words, without the contestant and the number."""
        size = f"{self.page_bytes // 1024} KiB" if self.page_bytes else ""
        return " ".join(filter(None, (self.engine, size, self.shape, self.operation)))
