"""The benchmark measures what it says, with small pages and no look at the speed."""

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

import tests.bench.tiers.__main__ as command
from kvstrata.kernels.bench.results.targets import summary
from tests.bench.fs.figures import Figure
from tests.bench.jobs import WrongBytes
from tests.bench.tiers import contestants
from tests.bench.tiers.contestants import Ours, Raw
from tests.bench.tiers.measure import ALONE, AT_ONCE, measure
from tests.bench.tiers.media import MEDIA
from tests.bench.tiers.targets import TARGETS
from tests.tiers.mooncake.pool import why_not
from tests.tiers.valkey.server import server_binary

PAGE = 4096


@pytest.mark.parametrize("name", MEDIA)
def test_each_case_has_its_figures(name: str, tmp_path: Path) -> None:
    if name == "valkey" and server_binary() is None:
        pytest.skip("there is no valkey server")
    if name == "mooncake" and (why := why_not()):
        pytest.skip(why)
    with MEDIA[name](tmp_path) as medium:
        figures = list(measure(name, medium, PAGE, 1))
    assert len(figures) == len({figure[:-1] for figure in figures}) == 2 * 2 * 4
    assert all(figure.value > 0 for figure in figures)
    assert {f.shape for f in figures if f.metric == "p99 ms"} == {ALONE}
    assert {f.shape for f in figures if f.metric == "GB/s"} == {AT_ONCE}
    assert {f.contestant for f in figures} == {Ours.name, Raw.name}


def test_nothing_of_a_pool_stays_behind(tmp_path: Path) -> None:
    with MEDIA["pool"](tmp_path) as medium:
        list(measure("pool", medium, PAGE, 1))
        names = [str(medium.options["name"]), Path(medium.argument).name]
    left = [path for path in Path("/dev/shm").iterdir() if path.name.endswith(tuple(names))]
    assert left == []


def test_other_bytes_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = Ours.together

    def flip(self: Ours, store: bool, keys: Sequence[bytes]) -> float:
        seconds = together(self, store, keys)
        if not store:
            self._memory.view[5 * PAGE] ^= 1
        return seconds

    monkeypatch.setattr(contestants.Ours, "together", flip)
    with MEDIA["fs"](tmp_path) as medium, pytest.raises(WrongBytes, match="fs: load"):
        list(measure("fs", medium, PAGE, 1))


def test_the_command_writes_a_table_and_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main(tmp_path / "root", ["fs"], tmp_path / "tiers.csv", 1, [4])
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("targets: ") and "fs: store" in "".join(printed)
    with open(tmp_path / "tiers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16 and {"machine", "kernel", *Figure._fields} <= set(rows[0])
    shutil.rmtree(tmp_path / "root")


def test_each_target_is_of_its_figures() -> None:
    figures = [
        Figure(who, "valkey: load", AT_ONCE, "", 2**19, "GB/s", value)
        for who, value in ((Ours.name, 1.9), (Raw.name, 2.0))
    ]
    line = summary(target.held(figures) for target in TARGETS)
    assert "1 met (valkey, against its client: 0.95 >= 0.9" in line
