"""The benchmark of rounding compares the files of equal keys."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from kvstrata.offload.audit.comparison import Verdict
from tests.bench.rounding import compared, pages

RIGHT = np.random.default_rng(0).random((2, 3, 4, 8), np.float32)  # heads, layers, rows, content


def store(folder: Path, name: str, content: np.ndarray) -> None:
    path = folder / "model_r0" / "abc" / "de_g0" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"kv": content}, path)


def test_pages_that_both_have_are_compared(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for name in ("0.safetensors", "1.safetensors", "2.safetensors", "ours.safetensors"):
        store(ours, name, RIGHT)
    store(theirs, "0.safetensors", RIGHT)
    store(theirs, "1.safetensors", RIGHT * np.float32(1 + 1e-6))
    store(theirs, "2.safetensors", RIGHT + 1)
    found = compared(pages(ours), pages(theirs), "float32")
    assert [each.verdict is Verdict.EQUAL for each in found] == [True, False, False]
    assert [each.verdict is Verdict.DIFFERENT for each in found] == [False, False, True]
    assert 0 < found[1].error < found[2].error
