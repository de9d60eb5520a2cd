"""Requests' wishes: what is understood, and that wrong ones never hurt."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.offload.wishes import NO_WISHES, Wishes, WishReader

TIERS = ("fs", "memory")


@pytest.mark.parametrize(
    ("wishes", "meant"),
    [
        ({}, NO_WISHES),
        ({"persist": True}, NO_WISHES),
        ({"persist": False}, Wishes(frozenset())),
        ({"tiers": ["fs"]}, Wishes(frozenset({"fs"}))),
        ({"tiers": []}, Wishes(frozenset())),
        ({"tiers": ["fs"], "persist": False}, Wishes(frozenset())),
        ({"pin_seconds": 600}, Wishes(None, 600.0)),
        ({"pin_seconds": 0.5, "tiers": ["memory", "fs"]}, Wishes(frozenset(TIERS), 0.5)),
    ],
)
def test_what_is_understood(wishes: dict[str, object], meant: Wishes) -> None:
    reader = WishReader(TIERS)
    assert reader.read({"kvstrata": wishes, "max_offload_tokens": 3}) == meant
    assert reader.ignored == 0
    assert reader.read({}) is reader.read({"kvstrata": None}) is NO_WISHES


@pytest.mark.parametrize(
    ("wishes", "says"),
    [
        (7, 'kvstrata=7 is ignored: use an object such as {"persist": false}'),
        ({"persist": 0}, "persist=0 is ignored: use true or false"),
        ({"tiers": "fs"}, "tiers='fs' is ignored: use a list of names of secondary tiers (fs, m"),
        ({"tiers": ["disk"]}, "tiers=['disk'] is ignored: use a list of names"),
        ({"tiers": [["fs"]]}, "tiers=[['fs']] is ignored: use a list of names"),
        ({"pin_seconds": -1}, "pin_seconds=-1 is ignored: use a number from 0 to 86400"),
        ({"pin_seconds": float("nan")}, "pin_seconds=nan is ignored"),
        ({"pin_seconds": True}, "pin_seconds=True is ignored"),
        ({"pin_seconds": 1e9}, "pin_seconds=1000000000.0 is ignored"),
        ({"pin_second": 5}, "pin_second=5 is ignored: the wishes are persist, tiers, pin_seconds"),
        ({"store_fraction": 0.5}, "store_fraction=0.5 is ignored: send kv_transfer_params.max_off"),
    ],
)
def test_what_is_wrong_is_ignored_with_one_warning(
    wishes: object, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    reader = WishReader(TIERS)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert reader.read({"kvstrata": wishes}) == NO_WISHES
    (message,) = [record.getMessage() for record in caplog.records]
    assert says in message
    assert reader.ignored == 3


def test_one_wrong_wish_leaves_the_others() -> None:
    wishes = {"tiers": 7, "pin_seconds": 5, "nonsense": None}
    assert WishReader(TIERS).read({"kvstrata": wishes}) == Wishes(None, 5.0)


def test_clients_cannot_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    reader = WishReader(TIERS)
    with caplog.at_level(logging.WARNING):
        for number in range(1000):
            reader.read({"kvstrata": {f"{number}" * 1000: "x" * 10**5}})
    assert reader.ignored == 1000
    assert len(caplog.records) == 100
    assert max(len(record.getMessage()) for record in caplog.records) < 1000


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


@given(wishes=JSON | st.dictionaries(st.sampled_from(["persist", "tiers", "pin_seconds"]), JSON))
def test_nothing_raises(wishes: object) -> None:
    meant = WishReader(TIERS).read({"kvstrata": wishes})
    assert meant.tiers is None or meant.tiers <= set(TIERS)
    assert 0.0 <= meant.pin_seconds <= 86400.0
