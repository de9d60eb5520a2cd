"""Two namespaces compared: the fields that differ, by name, and their values as short text."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.tiers.fs.files.differences import ABSENT, Difference, differences, leaves, short
from kvstrata.tiers.page.identity import canonical_json

ROPE = {"rope_theta": 5e5, "rope_scaling": {"factor": 8.0, "kind": "llama3"}}


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ({"a": 1, "b": [1, {"c": 2}]}, {"b": [1, {"c": 2}], "a": 1}, []),
        ({"a": 1}, {"a": 2}, [("a", 2, 1)]),
        ({"a": 1}, {"a": True}, [("a", True, 1)]),
        ({"a": 1}, {"a": 1.0}, [("a", 1.0, 1)]),
        ({"a": None}, {}, [("a", ABSENT, None)]),
        ({"a": (1, 2)}, {"a": [1, 2]}, []),
        ({"a": {1: "x"}}, {"a": {"1": "x"}}, []),
        ({"a": [1, 2, 3]}, {"a": [1, 5, 3]}, [("a[1]", 5, 2)]),
        ({"a": [1, 2, 3]}, {"a": [1, 2]}, [("a", [1, 2], [1, 2, 3])]),
        ({"a": {}}, {"a": []}, [("a", [], {})]),
        ({"m": {"hf": ROPE}}, {"m": {"hf": {**ROPE, "rope_theta": 1e4}}},
         [("m.hf.rope_theta", 1e4, 5e5)]),
        ({"m": {"hf": ROPE}}, {"m": {}}, [("m.hf", ABSENT, ROPE)]),
        ({"z": 1, "a": {"b": 1}}, {"z": 2, "a": {"b": 2}}, [("z", 2, 1), ("a.b", 2, 1)]),
        ({"p": {"0": {"model.x": [{"d": 1}]}}}, {"p": {"0": {"model.x": [{"d": 2}]}}},
         [('p.0["model.x"][0].d', 2, 1)]),
        ({"a": 1}, {"a": 1, "\x1b\n": 2}, [(r'["\u001b\n"]', 2, ABSENT)]),
    ],
    ids=range(15),
)  # fmt: skip
def test_differences(
    ours: dict[str, Any], theirs: dict[str, Any], expected: list[tuple[str, object, object]]
) -> None:
    found = differences(ours, theirs)
    assert [tuple(each) for each in found] == expected
    assert [type(each.theirs) for each in found] == [type(each[1]) for each in expected]
    turned = [Difference(name, mine, yours) for name, yours, mine in expected]
    assert differences(theirs, ours) == turned


values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "a", "b.c", "\x1b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=8,
)
objects = st.dictionaries(st.sampled_from("abc"), values)


@given(ours=objects, theirs=objects)
def test_two_namespaces_differ_where_their_digests_do(
    ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    found = differences(ours, theirs)
    assert bool(found) == (canonical_json(ours) != canonical_json(theirs))
    for each in found:
        assert each.name.isprintable()
        assert all(text.isprintable() and len(text) < 60 for text in each.values(20))


def test_leaves() -> None:
    fields = {
        "z": None,
        "pages": {"0": {"tokens": 16, "tensors": [["kv", [4, 3]]]}},
        "empty": {"list": [], "object": {}},
        "a": [{"x": 1}, 2],
    }
    assert list(leaves(fields)) == [
        ("a[0].x", 1),
        ("a[1]", 2),
        ("z", None),
        ("empty.list", []),
        ("empty.object", {}),
        ("pages.0.tensors", [["kv", [4, 3]]]),
        ("pages.0.tokens", 16),
    ]
    assert list(leaves({})) == []


def test_short() -> None:
    assert short(ABSENT, 3) == "absent"[:3] + "..."
    assert short(ABSENT, 6) == "absent"
    assert short("a\x1b", 20) == '"a\\u001b"'
    assert short("0123456789", 5) == '"0123...'
    assert short(list(range(9)), 7) == "[0, 1, ... (9 items)"
    assert short({"a": 1, "b": 2}, 7) == '{"a": 1... (2 fields)'


def test_values_that_differ_late_are_shown_where_they_part() -> None:
    texts = Difference("x", "q" * 70 + "abc", "q" * 70 + "def").values(8)
    assert texts == ('...qqabc"', '...qqdef"')
    layers = [f"layers.{n}" for n in range(32)]
    texts = Difference("x", layers[:16], layers).values(40)
    assert texts[0].endswith('layers.15"] (16 items)')
    assert 'layers.15", "layers.16"' in texts[1] and texts[1].endswith("... (32 items)")
    assert Difference("x", 4096, 8192).values(40) == ("4096", "8192")
    huge = json.loads("[" * 20 + "]" * 20)
    assert Difference("x", huge, ABSENT).values(200) == ("[" * 20 + "]" * 20, "absent")
