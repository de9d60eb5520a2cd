"""The CPU benchmark measures what it says, with small pages and no look at the speed."""

import pytest

from kvstrata.kernels.bench import cpu

SMALL = cpu.Shape(layers=2, heads=3, blocks=2, slab_bytes=64)


def test_each_case_has_its_figures() -> None:
    figures = list(cpu.measure(3, (SMALL,), round_bytes=5 * SMALL.page_bytes))
    cases = {figure.case for figure in figures}
    assert len(cases) == 2 * 2
    for case in cases:
        mine = [f for f in figures if f.case == case]
        assert [(f.contestant, f.unit) for f in mine] == [
            (cpu.OURS, "GB/s"),
            (cpu.MEMCPY, "GB/s"),
            (cpu.OURS, ""),
        ]
        assert all(figure.value > 0 for figure in mine)


def test_the_shapes_are_the_pages_that_the_target_names() -> None:
    assert [shape.page_bytes for shape in cpu.SHAPES] == [128 << 10, 512 << 10, 2 << 20, 8 << 20]


@pytest.mark.parametrize("direction", ["store", "load"])
def test_a_copy_that_moves_other_bytes_is_found_out(
    direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(cpu.World, direction)

    def wrong(self: cpu.World) -> None:
        right(self)
        place = self.region if direction == "store" else self.views[1].flatten()
        place[77] ^= 1

    monkeypatch.setattr(cpu.World, direction, wrong)
    with pytest.raises(cpu.WrongBytes, match=direction):
        list(cpu.measure(1, (SMALL,), round_bytes=5 * SMALL.page_bytes))
