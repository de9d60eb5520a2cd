from dataclasses import InitVar, dataclass, fields
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.tiers.base import SecondaryTier, TierConfigError
from kvstrata.tiers.options import (
    MAX_BYTES,
    option,
    options_of,
    or_none,
    parse_bytes,
    parse_choice,
    parse_count,
    parse_flag,
    parse_mode,
    parse_number,
    parse_options,
    parse_text,
)


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (1, 1),
        (MAX_BYTES, MAX_BYTES),
        ("1024", 1024),
        ("8GiB", 8 * 2**30),
        ("500MB", 500_000_000),
        ("1.5TiB", 3 * 2**39),
        (" 2 kib ", 2048),
        ("7b", 7),
        ("1.1KiB", 1126),
        ("8G", 8 * 10**9),
        ("8 Gi", 2**33),
        ("3k", 3000),
        ("2PiB", 2**51),
        (8e9, 8 * 10**9),
        (1.5, 1),
    ],
)
def test_parse_bytes(value: object, size: int) -> None:
    assert parse_bytes("key", value) == size


@pytest.mark.parametrize(
    "value",
    [
        *[0, -1, True, False, None, 0.5, 1e30, float("nan"), float("inf"), [], {}, b"1GiB"],
        *["", "GiB", "0", "0GiB", "0.5B", "-1GiB", "+1", "1e9", "nan", "inf", "8X", "8 Gigs"],
        *["8GiBs", "1,5GiB", "0x10", "\u0663GiB", "1.GiB", "2EiB", "1\n2", "9" * 25],
        *[2**60 + 1, "1048577TiB"],
    ],
    ids=repr,
)
def test_parse_bytes_refuses(value: object) -> None:
    with pytest.raises(TierConfigError, match=r"cpu_bytes_to_use: .*8GiB"):
        parse_bytes("cpu_bytes_to_use", value)


@given(st.integers(1, 2**20), st.sampled_from([("KiB", 2**10), ("GB", 10**9), ("TiB", 2**40)]))
def test_parse_bytes_scales_exactly(number: int, unit: tuple[str, int]) -> None:
    assert parse_bytes("key", f"{number}{unit[0]}") == number * unit[1]


@pytest.mark.parametrize("value", [0, -3, 1.0, "4", None, True, 65])
def test_parse_count_refuses(value: object) -> None:
    assert parse_count("n", 64, 64) == 64
    with pytest.raises(TierConfigError, match=r"n: .* from 1 to 64"):
        parse_count("n", value, 64)


@pytest.mark.parametrize("value", ["Direct", "", None, 1, ["direct"]])
def test_parse_choice_refuses(value: object) -> None:
    assert parse_choice("io", "direct", ("auto", "direct")) == "direct"
    with pytest.raises(TierConfigError, match=r"io: .* one of auto, direct"):
        parse_choice("io", value, ("auto", "direct"))


def test_the_remedy_for_a_directory_is_one_that_can_be_entered() -> None:
    with pytest.raises(TierConfigError, match='"0750"'):
        parse_mode("dir_mode", "0600", 0o700)


def test_parse_mode() -> None:
    assert parse_mode("m", "0640", 0o600) == 0o640
    assert parse_mode("m", "0o644", 0o600) == 0o644
    assert parse_mode("m", 0o600, 0o600) == 0o600


@pytest.mark.parametrize(
    "value", ["0900", "rw", "", "-600", 640, "01777", True, None, 1.0, "0040"], ids=repr
)
def test_parse_mode_refuses(value: object) -> None:
    with pytest.raises(TierConfigError, match=r'file_mode: .*"0640"|file_mode: .*lacks'):
        parse_mode("file_mode", value, 0o600)


# -- a table of options ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Options:
    root_dir: str = option(parse_text, "the directory of [files](x.md); or `nothing`")
    size: int = option(parse_bytes, "bytes", default=7, key="max_bytes", other_names="quota")
    only_checked: InitVar[Any] = option(parse_flag, "checked", default=False, other_names="quota")
    share: float = option(partial(parse_number, most=1.0), "a share", default=0.5, shown="half")
    note: str | None = option(or_none(parse_text), "a note", default=None)


def parse(**given: object) -> Options:
    return parse_options(Options, {"root_dir": "/a", **given}, "odd tier")


def test_what_is_left_out_has_its_default() -> None:
    assert parse() == Options("/a", size=7, share=0.5, note=None)
    assert parse(max_bytes="1KiB", share=1, note="x") == Options(
        "/a", size=1024, share=1.0, note="x"
    )
    assert parse(note=None) == parse(only_checked=True) == parse()
    assert "only_checked" not in {each.name for each in fields(Options)}


def test_the_table_says_what_a_user_would_write() -> None:
    found = {key: made.default for key, made in options_of(Options).items()}
    assert found == {
        "root_dir": "required",
        "max_bytes": "`7`",
        "only_checked": "`false`",
        "share": "half",
        "note": "none",
    }
    assert options_of(object) == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"root_dir": None}, "^root_dir is missing: give the directory of files$"),
        ({"root_dir": ""}, "^root_dir: '' is wrong; give a string$"),
        ({"max_bytes": 0}, "^max_bytes: 0 is not positive"),
        ({"only_checked": 1}, "^only_checked: 1 is wrong; give true or false$"),
        ({"only_checked": "true"}, "true or false, without quotes$"),
        ({"share": 0}, "^share: 0 is wrong; give a number above 0 and at most 1$"),
        ({"share": "0.5"}, "at most 1, without quotes$"),
        ({"size": 1}, "^odd tier: unknown key 'size'; known keys: max_bytes, note, only_checked, "),
        ({"rootdir": 1}, r"'rootdir' \(did you mean 'root_dir'\?\); known keys: "),
        ({"Quota": 1}, "^odd tier: unknown key 'Quota': use max_bytes and only_checked$"),
    ],
    ids=repr,
)
def test_what_is_wrong_is_named(given: dict[str, object], message: str) -> None:
    with pytest.raises(TierConfigError, match=message):
        parse(**given)


def test_without_options_every_key_is_unknown() -> None:
    class Plain(SecondaryTier): ...

    Plain.check_options({})
    with pytest.raises(TierConfigError, match=r"^Plain: unknown key 'x'; known keys: none$"):
        Plain.check_options({"x": 1})


@pytest.mark.parametrize("value", ["0", "0.0 GiB", " 0KiB", 0, 0.0], ids=repr)
def test_zero_bytes_in_any_way(value: object) -> None:
    assert parse_bytes("key", value, zero=True) == 0
    with pytest.raises(TierConfigError, match="is not positive"):
        parse_bytes("key", value)


@pytest.mark.parametrize("value", ["0 apples", "0.1B", -0.5, "-0"], ids=repr)
def test_what_is_not_quite_zero(value: object) -> None:
    with pytest.raises(TierConfigError):
        parse_bytes("key", value, zero=True)
