"""Sizes and prices as one writes them, and the cheapest that is good enough."""

import sys
from pathlib import Path

import pytest

from kvstrata.offload.simulate.chart import check, draw
from kvstrata.offload.simulate.costs import Prices, parse_endurance, parse_price
from kvstrata.offload.simulate.results import Result
from kvstrata.offload.simulate.setup import parse_setup, sized
from kvstrata.offload.simulate.sweep import Target, cheapest, grid, pairs, sizes
from kvstrata.tiers.options import ConfigError

GIB, TIB = 2**30, 2**40


def result(cpu: int, fs: int, hits: int, ttft: float, policy: str = "lru") -> Result:
    """So many GiB of tiers in which so many of 100 tokens are found."""
    setup = parse_setup(sized({"eviction_policy": policy}, cpu * GIB, fs * GIB))
    times = {50: ttft / 2, 90: ttft, 99: 2 * ttft}
    return Result(setup.name, setup, 100, {"cpu": hits}, ttft=times)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("8GiB", [8 * GIB]),
        ("0", [0]),
        ("8GiB..64GiB", [8 * GIB, 16 * GIB, 32 * GIB, 64 * GIB]),
        ("8GiB..20GiB", [8 * GIB, 16 * GIB, 20 * GIB]),
        ("0..8TiB", [0, TIB, 2 * TIB, 4 * TIB, 8 * TIB]),
        ("8GiB..8GiB", [8 * GIB]),
    ],
)
def test_sizes_are_doubled_from_end_to_end(text: str, found: list[int]) -> None:
    assert sizes("fs", text) == found


def test_every_size_is_combined_with_every_other() -> None:
    points = [*grid("cpu=8GiB..16GiB, fs=0..8TiB")]
    assert len(points) == 2 * 5
    assert points[:2] == [{"cpu": 8 * GIB, "fs": 0}, {"cpu": 8 * GIB, "fs": TIB}]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cpus=8GiB", "give name=value of cpu, fs (did you mean 'cpu'?)"),
        ("cpu", "'cpu' has no value; give cpu=VALUE"),
        ("cpu=8GiB,cpu=16GiB", "cpu is given twice"),
        ("cpu=lots", "--sweep cpu: 'lots' is not a size"),
        ("cpu=0", "--sweep cpu: '0' is not positive"),
        ("fs=8..64GiB", "--sweep fs: '8' is wrong; give a unit too"),
        ("cpu=16GiB..8GiB", "--sweep cpu: '16GiB..8GiB' is wrong; give the smaller size first"),
    ],
)
def test_a_wrong_sweep_is_one_clear_error(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        [*grid(text)]
    assert said in str(caught.value)


def test_sizes_take_the_place_of_those_in_a_configuration() -> None:
    tier = {"type": "fs", "root_dir": "/mnt/kv", "max_bytes": "1TiB", "store_threshold": 2}
    base = {"cpu_bytes_to_use": "8GiB", "secondary_tiers": [tier]}
    assert sized(base, None, None) == base
    setup = parse_setup(sized(base, GIB, 2 * TIB))
    assert (setup.config.cpu_bytes, setup.disk_bytes) == (GIB, 2 * TIB)
    assert setup.config.tiers[0].store_threshold == 2
    assert parse_setup(sized(base, None, 0)).disk_bytes is None
    assert parse_setup(sized({}, GIB, GIB)).name == "cpu 1.0 GiB, fs 1.0 GiB, auto"
    assert (
        parse_setup({"cpu_bytes_to_use": GIB, "secondary_tiers": [{"type": "fs"}]}).disk_bytes == 0
    )


def test_a_share_of_a_disk_says_nothing_without_the_disk() -> None:
    tiers = [{"type": "fs", "max_bytes": "50%"}]
    with pytest.raises(ConfigError, match="max_bytes: '50%' is not a size"):
        parse_setup({"cpu_bytes_to_use": "1GiB", "secondary_tiers": tiers})


def test_prices_are_of_units() -> None:
    assert parse_price("cpu", "4/GiB") == 4 / GIB
    assert parse_price("fs", "80 / TB") == 80 / 10**12
    prices = Prices({"cpu": 4 / GIB, "fs": 0.1 / GIB})
    assert prices.of(result(8, 100, 1, 1.0)) == pytest.approx(32 + 10)
    assert prices.of(result(8, 0, 1, 1.0)) == pytest.approx(32)
    for wrong in ("4", "4/", "x/GiB", "4/parsec", "-1/GiB"):
        with pytest.raises(ConfigError, match=r"price of cpu|is not a size"):
            parse_price("cpu", wrong)


def test_endurance_is_what_may_be_written_each_day() -> None:
    assert parse_endurance("7PB") == 7e15 / (5 * 365)
    assert parse_endurance("1x3.84TB") == 3.84e12
    assert parse_endurance("0.5 x 2TB") == 1e12
    for wrong, said in (
        ("long", "endurance: 'long' is not a size"),
        ("0x3TB", "endurance: '0x3TB' is wrong; give drive writes a day that are more than 0"),
        ("7", "endurance: '7' is wrong; give a unit too, such as \"7GB\""),
        ("1x3.84", "endurance: '3.84' is wrong; give a unit too"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse_endurance(wrong)


def test_the_cheapest_that_is_good_enough() -> None:
    prices = Prices({"cpu": 4 / GIB, "fs": 0.1 / GIB})
    results = [result(8, 0, 10, 9.0), result(8, 100, 30, 5.0), result(64, 0, 40, 1.0)]
    assert cheapest(results, prices, Target(hit_rate=0.3)) is results[1]
    assert cheapest(results, prices, Target(hit_rate=0.1)) is results[0]
    assert cheapest(results, prices, Target(ttft_s=2.0)) is results[2]
    assert cheapest(results, prices, Target(0.1, 5.0)) is results[1]
    assert cheapest(results, prices, Target(hit_rate=0.5)) is None
    unreal = Result("optimum", results[0].setup, 100, {"all": 90})
    assert cheapest([unreal], prices, Target(hit_rate=0.3)) is None


def test_names_and_values() -> None:
    assert pairs("--speed", "read = 3GB,write=1GB", ["read", "write"]) == {
        "read": "3GB",
        "write": "1GB",
    }


def test_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = [result(8 << at, fs, 10 + at, 9.0 - at) for at in range(4) for fs in (0, 100)]
    path = tmp_path / "curve.svg"
    check(str(path))
    draw(results, str(path))
    drawn = path.read_text()
    assert drawn.count("<!-- fs 100.0 GiB, lru -->") + drawn.count("<!-- lru -->") == 2
    for name in ("curve.doc", "curve"):
        with pytest.raises(ConfigError, match=rf"--chart: .*{name}' is wrong; give .*, png, .*svg"):
            check(str(tmp_path / name))
    with pytest.raises(ConfigError, match="give a file in a directory that exists"):
        check(str(tmp_path / "none/curve.png"))


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"--chart: matplotlib .* 'kvstrata\[tools\]'"):
        check("curve.png")
