"""The sizing rule of the README, by which its table is computed."""

import re

import pytest

from kvstrata.kernels.bench.models import MODELS
from tests.docs.blocks import ROOT

README = (ROOT / "README.md").read_text()
GIB = 2**30
ROWS = re.findall(
    r"^\| ([\w.-]+)[^|]* \| (\d+) \| (\d+|MLA) \| (\d+|512 \+ 64) \| ([\d.]+) KiB \| ([\d,]+) \|$",
    README,
    re.M,
)


def token_bytes(layers: str, heads: str, size: str) -> int:
    """In bfloat16."""
    if heads == "MLA":
        return int(layers) * sum(map(int, size.split("+"))) * 2
    return 2 * int(layers) * int(heads) * int(size) * 2


def test_the_table_is_there() -> None:
    assert len(ROWS) == len(re.findall(r"KiB \| [\d,]+ \|$", README, re.M)) >= 5


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row(row: tuple[str, ...]) -> None:
    _, layers, heads, size, kib, tokens = row
    nbytes = token_bytes(layers, heads, size)
    assert abs(nbytes / 1024 - float(kib)) < 0.05
    assert GIB // nbytes == int(tokens.replace(",", ""))


def test_the_rule_is_that_of_the_kernels() -> None:
    """`kernels/bench/models.py` has the geometries of some of the models."""
    by_name = {row[0]: token_bytes(*row[1:4]) for row in ROWS}
    compared = 0
    for model in MODELS:
        name = model.config.rpartition("/")[2]
        if name in by_name:
            assert sum(group.token_bytes for group in model.groups) == by_name[name]
            compared += 1
    assert compared >= 2


def test_the_deployments_size() -> None:
    """Qwen3-8B: 36 layers, 8 KV heads of 128."""
    nbytes = token_bytes("36", "8", "128")
    text = (ROOT / "docs/deploy/README.md").read_text()
    assert f"{nbytes // 1024} KiB" in text
    for gib in (16, 200):
        tokens = gib * GIB // nbytes
        rounded = [round(tokens, -digits) for digits in (3, 4)]
        assert any(f"{about:,} tokens" in text or f"{about:,} and" in text for about in rounded)
