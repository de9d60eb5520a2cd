"""The bytes of a page: what a file holds, written and verified without one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.tiers.page.form import BadPage
from kvstrata.tiers.page.page import PageForm
from kvstrata.tiers.testing import CONTEXT, make_data, make_key
from tests.tiers.fs.test_contract import written_by_the_book

FORM = PageForm(CONTEXT)
KEY = make_key(1, group=1)
DATA = make_data(1, CONTEXT.layouts[1].nbytes)
WHOLE = written_by_the_book(CONTEXT, FORM.namespace, KEY, DATA)


def read(whole: bytes, key: bytes = KEY) -> bytes:
    view = memoryview(bytearray(FORM.layout(key).nbytes))
    FORM.read(key, whole, view)
    return bytes(view)


def test_it_is_what_the_format_says() -> None:
    assert FORM.header(KEY, memoryview(DATA)) + DATA == WHOLE
    assert FORM.size(KEY) == len(WHOLE) and FORM.header_size(KEY) == len(WHOLE) - len(DATA)
    assert read(WHOLE) == DATA


@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
def test_no_changed_byte_is_overlooked(place: int, change: int) -> None:
    changed = bytearray(WHOLE)
    changed[place] ^= change
    with pytest.raises(BadPage):
        read(bytes(changed))


@given(st.integers(0, len(WHOLE) - 1))
def test_what_is_cut_off_is_told(size: int) -> None:
    with pytest.raises(BadPage) as bad:
        read(WHOLE[:size])
    assert bad.value.cause == "truncated"


def test_each_wrong_thing_has_its_word() -> None:
    wholes = {
        "size": WHOLE + b"x",
        "key": written_by_the_book(CONTEXT, FORM.namespace, make_key(2, group=1), DATA),
        "namespace": written_by_the_book(CONTEXT, "0" * 12, KEY, DATA),
        "checksum": WHOLE[: -len(DATA)] + bytes(len(DATA)),
        "header": bytes(len(WHOLE)),
    }
    for cause, whole in wholes.items():
        with pytest.raises(BadPage) as bad:
            read(whole)
        assert bad.value.cause == cause
    with pytest.raises(BadPage) as bad:
        read(written_by_the_book(CONTEXT, FORM.namespace, KEY, DATA), make_key(1, group=2))
    assert bad.value.cause == "key"
