"""What the budget says across the border of a process: plain values, without the books."""

from __future__ import annotations

import os
from typing import NamedTuple

_ENGINE_BITS, COUNTER_BITS = 24, 40  # of an access; 34 years at 1,000 accesses per second

News = tuple[bytes, bool]  # an offload key, and whether its page is there now


class Upkeep(NamedTuple):
    """What a member did as the keeper: files it evicted and their bytes, temporaries removed."""

    evicted_files: int = 0
    evicted_bytes: int = 0
    swept_temporaries: int = 0


def first_access() -> int:
    """Where an engine begins to number its accesses, so that they differ from other engines'."""
    return int.from_bytes(os.urandom(_ENGINE_BITS // 8)) << COUNTER_BITS
