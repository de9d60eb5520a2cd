import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstrata.tiers.base import TierConfigError
from kvstrata.tiers.options import (
    MAX_BYTES,
    check_keys,
    parse_bytes,
    parse_choice,
    parse_count,
    parse_mode,
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


def test_check_keys_names_the_nearest() -> None:
    check_keys("place", {"root_dir": 1}, ("root_dir", "io"))
    with pytest.raises(TierConfigError, match=r"^place: .*'rootdir' \(did you mean 'root_dir'\?\)"):
        check_keys("place", {"rootdir": 1}, ("root_dir", "io"))
    with pytest.raises(TierConfigError, match=r"'zzzzz'; known keys: io, root_dir$"):
        check_keys("place", {"zzzzz": 1}, ("root_dir", "io"))


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
