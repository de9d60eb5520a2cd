"""Values as plain JSON."""

import enum
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from kvstrata.offload.vllm_plugin.engine.errors import NamespaceError  # noqa: E402
from kvstrata.offload.vllm_plugin.namespace.values import (  # noqa: E402
    digest_of,
    plain,
    shortened,
    without,
)


class Kind(enum.StrEnum):
    FULL = "full_attention"


PLAIN: list[tuple[Any, Any]] = [
    (None, None),
    (True, True),
    (3, 3),
    (0.5, 0.5),
    (math.inf, "inf"),
    (-math.inf, "-inf"),
    (math.nan, "nan"),
    ("é", "é"),
    (b"\x01", "01"),
    (Path("/a"), "/a"),
    (Kind.FULL, "FULL"),
    (torch.float16, "torch.float16"),
    (np.float32(0.25), 0.25),
    (np.arange(2), [0, 1]),
    (torch.tensor([1.0, math.inf]), [1.0, "inf"]),
    ((1, (2,)), [1, [2]]),
    ({"b", "a"}, ["a", "b"]),
    ({3, 20}, [20, 3]),
    ({1: "x", None: "y"}, {"1": "x", "None": "y"}),
    (Counter("aab"), {"a": 2, "b": 1}),
    (SimpleNamespace(x=1), {"x": 1}),
    (dict, "builtins.dict"),
    (json.dumps, "json.dumps"),
]


@pytest.mark.parametrize(("value", "expected"), PLAIN, ids=range(len(PLAIN)))
def test_plain(value: Any, expected: Any) -> None:
    found = plain(value, "field")
    assert found == expected and type(found) is type(expected)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("value", [object(), lambda: 0, open, {"a": [object()]}])
def test_no_text(value: Any) -> None:
    with pytest.raises(NamespaceError, match=r"field.* no text that is the same in every process"):
        plain(value, "field")


def test_two_keys_of_one_text() -> None:
    with pytest.raises(NamespaceError, match="field has two keys that are written '1'"):
        plain({1: 0, "1": 0}, "field")


def test_endless_values() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(NamespaceError, match=r"field\[0\].*nested too deep"):
        plain(value, "field")


def test_without() -> None:
    assert without({"a": 1, "b": [{"a": 2, "c": 3}]}, {"a"}) == {"b": [{"c": 3}]}


def test_long_values_are_shortened_where_they_are_long() -> None:
    short = {"a": [1, 2], "b": "x" * 60_000}
    assert shortened(short) == short
    long = {"a": [1, 2], "layers": {"names": [f"layer {i}" for i in range(10_000)]}}
    found = shortened(long)
    assert found["a"] == [1, 2] and found["layers"]["names"].startswith("sha256:")
    long["layers"]["names"][5_000] = "other"
    assert shortened(long) != found
    many = shortened({str(i): "x" for i in range(10_000)})
    assert many == digest_of(
        json.dumps(
            {str(i): "x" for i in range(10_000)}, sort_keys=True, separators=(",", ":")
        ).encode()
    )
