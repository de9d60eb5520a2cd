"""Whether what a tier holds may be loaded, after what audits found of it."""

from __future__ import annotations

from collections import deque

REMEMBERED = 100  # audits
MOST_DIFFERENT = 3  # of them; so many different ones are no accident of single pages


class Trust:
    """The last audits of one tier's pages."""

    def __init__(self) -> None:
        self._different: deque[bool] = deque(maxlen=REMEMBERED)
        self.lost = False  # asked for every chunk, so not a property

    def note(self, *, different: bool) -> bool:
        """An audit of one of the tier's pages ended; whether it cost the tier its trust."""
        self._different.append(different)
        if self.lost or sum(self._different) < MOST_DIFFERENT:
            return False
        self.lost = True
        return True

    def restore(self) -> None:
        """Begin anew."""
        self._different.clear()
        self.lost = False
