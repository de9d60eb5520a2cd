"""Equal, close and different pages, in every dtype and content."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.offload.audit.comparison import (
    FIRST_LAYER,
    TOLERANCES,
    Elements,
    Verdict,
    compare,
)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
HEADS, LAYERS, TOKENS, WIDTH = 2, 3, 8, 32


def page(dtype: str, seed: int = 0) -> torch.Tensor:
    """A page [H, L, N, C] of numbers as a model's are, rounded to the dtype."""
    values = torch.randn(
        *(HEADS, LAYERS, TOKENS, WIDTH),
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(seed),
    )
    return values.to(DTYPES[dtype]).double()


def as_bytes(values: torch.Tensor, dtype: str) -> memoryview:
    data = values.to(DTYPES[dtype]).contiguous().view(torch.uint8).numpy()
    return memoryview(data.tobytes())


def elements(dtype: str, **more: object) -> list[Elements]:
    row = WIDTH * DTYPES[dtype].itemsize
    nbytes = HEADS * LAYERS * TOKENS * row
    return [Elements(nbytes, dtype, row, TOKENS, LAYERS, 2, **more)]  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_page_equals_itself(dtype: str) -> None:
    one = as_bytes(page(dtype), dtype)
    found = compare(one, memoryview(bytes(one)), elements(dtype))
    assert found == (Verdict.EQUAL, 0.0, "")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_close(dtype: str) -> None:
    """Every number moves by one unit in the last place of its dtype."""
    values = page(dtype)
    factor = 1 + float(torch.finfo(DTYPES[dtype]).eps)
    found = compare(as_bytes(values * factor, dtype), as_bytes(values, dtype), elements(dtype))
    assert found.verdict is Verdict.CLOSE
    assert 0 < found.error <= FIRST_LAYER[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [(0, 0), (1, 7)], ids=["first", "last"])
def test_one_row_of_the_first_layer_is_enough(dtype: str, place: tuple[int, int]) -> None:
    values, other = page(dtype), page(dtype)
    head, token = place
    other[head, 0, token, : WIDTH // 2] = page(dtype, 1)[head, 0, token, : WIDTH // 2]
    found = compare(as_bytes(values, dtype), as_bytes(other, dtype), elements(dtype))
    assert found.verdict is Verdict.DIFFERENT
    assert found.error > 0.7
    assert found.where == f"tensor 0, head {head}, layer 0, row {token}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_quarter_of_the_rows_of_another_layer_is_enough(dtype: str) -> None:
    """Fewer may be tokens for which a mixture of experts chose otherwise."""
    values, other = page(dtype), page(dtype)
    for token, verdict in ((3, Verdict.CLOSE), (6, Verdict.DIFFERENT)):
        other[1, 2, token, WIDTH // 2 :] *= -1
        found = compare(as_bytes(values, dtype), as_bytes(other, dtype), elements(dtype))
        assert found.verdict is verdict
        assert found.error > 1.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_layer_is_held_to_the_narrow_bound(dtype: str) -> None:
    """What rounding may do after many layers, it cannot do before the first."""
    between = 1 + (FIRST_LAYER[dtype] + TOLERANCES[dtype]) / 2
    for layer, verdict in ((0, Verdict.DIFFERENT), (1, Verdict.CLOSE), (2, Verdict.CLOSE)):
        values, other = page("F64"), page("F64")
        values[:, layer] *= between
        found = compare(as_bytes(values, dtype), as_bytes(other, dtype), elements(dtype))
        assert found.verdict is verdict, layer


def test_the_error_is_that_of_the_row() -> None:
    values, other = page("F32"), page("F32")
    off = 0.5 * other[0, 1, 2, :16].norm()
    other[0, 1, 2, :16] *= 1.5
    usual = other[0, 1, :, :16].norm(dim=1).numpy()
    usual = np.median(usual)
    want = off / max(other[0, 1, 2, :16].norm(), usual)
    found = compare(as_bytes(values, "F32"), as_bytes(other, "F32"), elements("F32"))
    assert found.error == pytest.approx(float(want), rel=1e-5)


def test_a_row_of_nearly_nothing_is_measured_by_its_neighbours() -> None:
    """The values of an attention sink are tiny: their relative error alone means nothing."""
    values, other = page("F32"), page("F32")
    values[0, 0, 0, 16:], other[0, 0, 0, 16:] = 1e-6, -1e-6
    found = compare(as_bytes(values, "F32"), as_bytes(other, "F32"), elements("F32"))
    assert found.verdict is Verdict.CLOSE and found.error < 1e-5


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E5M2"])
def test_what_is_no_number(dtype: str, special: float) -> None:
    values, other = page(dtype), page(dtype)
    values[0, 0, 0, 0] = other[0, 0, 0, 0] = special
    other[1, 0, 0, 1] *= 1 + 2 * float(torch.finfo(DTYPES[dtype]).eps)
    both = compare(as_bytes(values, dtype), as_bytes(other, dtype), elements(dtype))
    assert both.verdict is Verdict.CLOSE
    one = compare(as_bytes(values, dtype), as_bytes(page(dtype), dtype), elements(dtype))
    assert (one.verdict, one.error) == (Verdict.DIFFERENT, float("inf"))
    assert one.where == "tensor 0, head 0, layer 0, row 0"


def test_drafts_are_left_out() -> None:
    values, other = page("F32"), page("F32", 1)
    other[:, [0, 1]] = values[:, [0, 1]]
    ours, theirs = as_bytes(values, "F32"), as_bytes(other, "F32")
    assert compare(ours, theirs, elements("F32")).verdict is Verdict.DIFFERENT
    assert compare(ours, theirs, elements("F32", unstable=(2,))).verdict is Verdict.CLOSE
    assert compare(ours, theirs, elements("F32", unstable=(0, 1))).verdict is Verdict.DIFFERENT


def test_slabs_of_a_known_dtype() -> None:
    """Bytes in a backend's order: the file says U8, the numbers are float32."""
    slabs = [Elements(4 * 2 * 512, "F32", 512, 2, 2, 2)]  # 2 heads, 2 layers, 2 blocks
    values = np.random.default_rng(0).standard_normal(1024).astype(np.float32)
    other = values.copy()
    other[300] += 1e-4
    close = compare(memoryview(values.tobytes()), memoryview(other.tobytes()), slabs)
    assert close.verdict is Verdict.CLOSE
    other[256:384] = other[256:384][::-1]
    found = compare(memoryview(values.tobytes()), memoryview(other.tobytes()), slabs)
    assert found.verdict is Verdict.DIFFERENT
    assert found.where == "tensor 0, head 0, layer 1, row 0"


def test_bytes_of_unknown_meaning() -> None:
    unknown = [Elements(4096, "U8", 1024, 1)]
    random = np.random.default_rng(0)
    values = random.integers(0, 256, 4096, np.uint8)
    other = values.copy()
    other[:1024:3] ^= 1
    found = compare(memoryview(values.tobytes()), memoryview(other.tobytes()), unknown)
    assert found.verdict is Verdict.CLOSE and found.error == pytest.approx(1 / 3, abs=0.01)
    other[1024:2048] = random.integers(0, 256, 1024, np.uint8)
    found = compare(memoryview(values.tobytes()), memoryview(other.tobytes()), unknown)
    assert found.verdict is Verdict.DIFFERENT
    assert found.where == "tensor 0, head 1, layer 0, row 0"


def test_several_tensors() -> None:
    both = elements("F32") + elements("BF16")
    ours = bytes(as_bytes(page("F32"), "F32")) + bytes(as_bytes(page("BF16"), "BF16"))
    other = page("BF16")
    other[0, 0, 5] = -other[0, 0, 5]
    theirs = bytes(as_bytes(page("F32"), "F32")) + bytes(as_bytes(other, "BF16"))
    found = compare(memoryview(ours), memoryview(theirs), both)
    assert (found.verdict, found.where) == (
        Verdict.DIFFERENT,
        "tensor 1, head 0, layer 0, row 5",
    )


def test_large_pages_are_compared_in_steps() -> None:
    """A difference is found wherever it lies, also behind the first steps."""
    rows, row, heads = 64, 4096, 40  # 10 MiB
    large = [Elements(heads * rows * row, "F32", row, rows, 1, 2)]
    values = np.random.default_rng(1).standard_normal(heads * rows * row // 4, np.float32)
    for head, token in ((0, 0), (39, 63), (17, 5)):
        other = values.copy()
        start = (head * rows + token) * row // 4
        other[start : start + 512] *= -1
        found = compare(memoryview(values.tobytes()), memoryview(other.tobytes()), large)
        assert found.where == f"tensor 0, head {head}, layer 0, row {token}"
        assert found.error == pytest.approx(2.0, rel=0.2)


@pytest.mark.parametrize("name", ["F8_E4M3", "F8_E5M2"])
def test_the_values_of_8_bit_floats_are_torchs(name: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(DTYPES[name]).float().numpy()
    for code in range(256):
        one = torch.ones(2).to(DTYPES[name]).view(torch.uint8).numpy().tobytes()
        found = compare(memoryview(bytes([code] * 2)), memoryview(one), [Elements(2, name, 2, 1)])
        value = float(values[code])
        want = abs(value - 1) if np.isfinite(value) else np.inf
        assert found.error == pytest.approx(want, rel=1e-12)


@given(st.binary(min_size=96, max_size=96), st.binary(min_size=96, max_size=96))
def test_no_bytes_break_it(ours: bytes, theirs: bytes) -> None:
    for dtype in [*DTYPES, "U8"]:
        found = compare(memoryview(ours), memoryview(theirs), [Elements(96, dtype, 16, 3, 2, 2)])
        assert (found.verdict is Verdict.EQUAL) == (ours == theirs)
        assert found.error >= 0.0
        if found.verdict is Verdict.DIFFERENT:
            assert found.error > FIRST_LAYER.get(dtype, 0.75)


def test_json() -> None:
    (one,) = elements("BF16", unstable=(1,))
    *plain, unstable = one
    assert Elements(*json.loads(json.dumps(one))) == (*plain, list(unstable))
    assert list(unstable) == [1]
