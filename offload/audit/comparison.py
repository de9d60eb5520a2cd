"""Two pages of one key, number by number: equal, close, or different.

The same prompt computed in another batch, at another tensor-parallel size or by another kernel
rounds otherwise, so pages that are right need not be equal. What counts is the relative error of a
row, which is K or V of one token in one head of one layer where the content is known, and else what
the backend keeps together. Rounding grows from layer to layer, and where it turns a mixture of
experts' choice it can move a whole token: so the first layer is held to a narrow bound row by row,
the others to a wide one, which a quarter of a head's rows must pass. docs/audit.md has the errors
that were measured.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

# The largest relative errors that rounding is taken to explain, by safetensors dtype: of any row of
# the first layer, whose K and V are one rounding away from the embeddings, and of the rows of the
# others. What was measured between batch shapes and restarts is far below, and another RoPE base,
# revision or order of heads far above (docs/audit.md).
FIRST_LAYER: Mapping[str, float] = {
    "F64": 1e-3,
    "F32": 1e-3,
    "F16": 0.02,
    "BF16": 0.05,
    "F8_E4M3": 0.2,
    "F8_E5M2": 0.4,
}
TOLERANCES: Mapping[str, float] = {
    "F64": 1e-2,
    "F32": 1e-2,
    "F16": 0.1,
    "BF16": 0.25,
    "F8_E4M3": 0.4,
    "F8_E5M2": 0.6,
}
# In the other layers this share of the rows of a head must be over the bound: tokens of which an
# expert was chosen otherwise are fewer, and a block that went astray is more.
_SHARE_OF_ROWS = 0.25
# Of bytes whose meaning is not known: the share of them that may differ.
_BYTES_TOLERANCE = 0.75
_STEP_BYTES = 1 << 20  # compared at once; bounds the temporary memory to a few MiB


class Verdict(enum.Enum):
    """What a comparison found."""

    EQUAL = enum.auto()  # every bit
    CLOSE = enum.auto()  # rounding may explain it
    DIFFERENT = enum.auto()


class Elements(NamedTuple):
    """How the bytes of one tensor of a page are to be read for a comparison; in JSON a list."""

    nbytes: int  # of the tensor in the page
    dtype: str  # safetensors dtype of the elements, also where the file says U8; "U8" if unknown
    row_bytes: int  # that belong together: of one token in one head and layer, or of one block
    rows: int  # successive ones of one head of one layer
    layers: int = 1  # of a head
    parts: int = 1  # 2 where a row is K and then V
    first: int = 0  # index of the model's first layer, -1 where it is in another tensor
    # Indices of layers left out: of a draft, whose last token depends on the token behind the page
    unstable: Sequence[int] = ()


class Comparison(NamedTuple):
    """The verdict, and the largest error."""

    verdict: Verdict
    # Largest relative error of a row (of unknown bytes: the share that differs); 0.0 if equal,
    # infinite where only one page has a number
    error: float = 0.0
    where: str = ""  # tensor, head, layer and row of the largest error, in words; empty if equal


EQUAL = Comparison(Verdict.EQUAL)


def compare(computed: memoryview, served: memoryview, elements: Sequence[Elements]) -> Comparison:
    """Compare a page that the engine computed with the one that it would have been served.

    Args:
        computed, served: uint8, of equal size, which is that of `elements` together.
        elements: the page's tensors in their order.
    """
    ours, theirs = np.frombuffer(computed, np.uint8), np.frombuffer(served, np.uint8)
    worst, start = EQUAL, 0
    for index, each in enumerate(elements):
        end = start + each.nbytes
        found = _compare_tensor(ours[start:end], theirs[start:end], each, index)
        worst = _worse(worst, found)
        start = end
    return worst


_Bytes = npt.NDArray[np.uint8]
_Errors = npt.NDArray[np.float64]


def _compare_tensor(ours: _Bytes, theirs: _Bytes, elements: Elements, index: int) -> Comparison:
    """Head by head and layer by layer; a few of them at once where they are small."""
    unit = elements.rows * elements.row_bytes  # one layer of one head
    units = elements.nbytes // unit
    step = max(1, _STEP_BYTES // unit)
    worst = EQUAL
    for first in range(0, units, step):
        part = slice(first * unit, min(first + step, units) * unit)
        if np.array_equal(ours[part], theirs[part]):
            continue
        found = _errors(ours[part], theirs[part], elements)
        layers = np.arange(first, first + len(found)) % elements.layers
        found[np.isin(layers, elements.unstable)] = 0.0
        different = _is_different(found, layers == elements.first, elements.dtype)
        place = int(found.argmax())
        number, row = first + place // found.shape[1], place % found.shape[1]
        head, layer = divmod(number, elements.layers)
        worst = _worse(
            worst,
            Comparison(
                Verdict.DIFFERENT if different else Verdict.CLOSE,
                float(found.flat[place]),
                f"tensor {index}, head {head}, layer {layer}, row {row}",
            ),
        )
    return worst


def _worse(one: Comparison, other: Comparison) -> Comparison:
    """The worse verdict, and of equal ones the larger error."""
    return max(one, other, key=lambda each: (each.verdict.value, each.error))


def _is_different(errors: _Errors, is_first: npt.NDArray[np.bool_], dtype: str) -> bool:
    """Whether rounding cannot explain errors [units, rows] of units of which some are the first
    layer's."""
    if dtype not in TOLERANCES:
        return bool((errors > _BYTES_TOLERANCE).any())
    if (errors[is_first] > FIRST_LAYER[dtype]).any():
        return True
    rows = errors.shape[1]
    over = (errors > TOLERANCES[dtype]).sum(axis=1)
    return bool((over >= max(1.0, _SHARE_OF_ROWS * rows)).any())


def _errors(ours: _Bytes, theirs: _Bytes, elements: Elements) -> _Errors:
    """[units, rows]: the larger error of a row's parts."""
    shape = (-1, elements.rows, elements.parts, elements.row_bytes // elements.parts)
    ours, theirs = ours.reshape(shape), theirs.reshape(shape)
    if elements.dtype not in TOLERANCES:
        share: _Errors = (ours != theirs).mean(axis=3).max(axis=2)
        return share
    with np.errstate(invalid="ignore", over="ignore"):
        one, other = _numbers(ours, elements.dtype), _numbers(theirs, elements.dtype)
        off = one - other
        # not a number, or infinite, in both pages alike is no difference
        off[(one == other) | (np.isnan(one) & np.isnan(other))] = 0.0
        other[~np.isfinite(other)] = 0.0
        size = np.sqrt(np.einsum("urpe,urpe->urp", other, other, dtype=np.float64))
        distance = np.sqrt(np.einsum("urpe,urpe->urp", off, off, dtype=np.float64))
        # A row that is nearly nothing beside the others of its head is measured by those.
        usual = np.median(size, axis=1, keepdims=True)
        error = distance / np.maximum(np.maximum(size, usual), np.finfo(np.float32).tiny)
    error[np.isnan(error)] = np.inf
    largest: _Errors = error.max(axis=2)
    return largest


def _numbers(data: _Bytes, dtype: str) -> npt.NDArray[Any]:
    """The elements as float32, or float64 where they are."""
    if dtype == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype in _FLOAT8:
        return _FLOAT8[dtype][data]
    return data.view({"F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]).astype(
        np.float64 if dtype == "F64" else np.float32
    )


def _float8(exponent_bits: int, bias: int, *, infinities: bool) -> npt.NDArray[np.float32]:
    """The 256 values of an 8-bit float (Micikevicius et al., "FP8 formats for deep learning")."""
    mantissa_bits = 7 - exponent_bits
    codes = np.arange(256)
    exponent = codes >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = (codes & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
    values = np.where(
        exponent > 0, (1 + mantissa) * 2.0 ** (exponent - bias), mantissa * 2.0 ** (1 - bias)
    )
    highest = exponent == (1 << exponent_bits) - 1
    if infinities:
        values[highest] = np.where(mantissa[highest] == 0, np.inf, np.nan)
    else:
        values[codes & 0x7F == 0x7F] = np.nan
    return np.where(codes < 128, values, -values).astype(np.float32)


_FLOAT8 = {
    "F8_E4M3": _float8(4, 7, infinities=False),
    "F8_E5M2": _float8(5, 15, infinities=True),
}
