"""What is measured on a GPU: a case, and the numbers that belong to it."""

from typing import NamedTuple

STORE, LOAD, BOTH = OPERATIONS = ("store", "load", "both")
ONE_PAGE = "load of one page, expedited"

OURS = "kvstrata"  # as its calibration chose
STAGED = "staged"
PER_FRAGMENT = "per-fragment batch"  # one descriptor of cuMemcpyBatchAsync per fragment
ZERO_COPY = "zero-copy kernel"
INDEXED = "index_select"
AS_STOCK = "as stock vLLM"  # without one: a kernel loads small fragments, the batch all others
STOCK = "stock vLLM"
CEILING = "ceiling"  # cudaMemcpyAsync of one large pinned buffer
BASELINES = (PER_FRAGMENT, ZERO_COPY, INDEXED, AS_STOCK, STOCK)

SPEED, SHARE, SUBMIT = "speed", "of the ceiling", "CPU submit"
HOST = "host time without the driver"
SLOWDOWN, BESIDE = "slowdown", "moved beside it"
LARGE_BYTES = 64 << 20  # the batches that the targets speak of


class Case(NamedTuple):
    """What is moved.

    model, layout: "" where they play no part.
    operation: one of OPERATIONS, or words.
    per_chunk: blocks per chunk. blocks: of each group and direction.
    nbytes: of each direction, on this rank. fragment_bytes: mean size of what is contiguous in
        the caches and in the page.
    """

    model: str
    layout: str
    operation: str
    per_chunk: int = 0
    blocks: int = 0
    nbytes: int = 0
    fragment_bytes: int = 0

    def __str__(self) -> str:
        blocks = f"{self.blocks} blocks by {self.per_chunk}" if self.blocks else ""
        pieces = f"fragments {self.fragment_bytes} B" if self.fragment_bytes else ""
        return ", ".join(filter(None, (self.model, self.layout, self.operation, blocks, pieces)))


class Result(NamedTuple):
    """A figure: one number, the median of its repetitions.

    contestant: who moved it.
    metric, value, unit: what was measured; "ratio" has the unit "".
    """

    case: Case
    contestant: str
    metric: str
    value: float
    unit: str
