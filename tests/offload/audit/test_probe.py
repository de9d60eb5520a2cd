"""A probe withholds exactly the last page of a hit prefix, whatever the steps before it were."""

from hypothesis import given
from hypothesis import strategies as st

from kvstrata.offload.audit.probe import Probe
from kvstrata.offload.finding.lookup import Answer

HIT, MISS, PENDING, RETRY = Answer.HIT, Answer.MISS, Answer.PENDING, Answer.RETRY


def ask(probe: Probe, natural: list[Answer], step: int) -> list[Answer]:
    """The look-ups of one step, as vLLM makes them: to the first miss."""
    answers = []
    for index, answer in enumerate(natural):
        answers.append(probe.answer(bytes([index]), answer, step))
        if answers[-1] is MISS:
            break
    return answers


def test_pages_in_memory() -> None:
    probe = Probe()
    assert ask(probe, [HIT, HIT, HIT, MISS], 0) == [PENDING, PENDING, PENDING, MISS]
    assert ask(probe, [HIT, HIT, HIT, MISS], 1) == [HIT, HIT, MISS]
    assert probe.target == bytes([2])
    assert ask(probe, [HIT, HIT, HIT, MISS], 2) == [HIT, HIT, MISS], "and so on"


def test_the_whole_prompt() -> None:
    probe = Probe()
    ask(probe, [HIT, HIT], 4)
    assert ask(probe, [HIT, HIT], 5) == [HIT, MISS]


def test_pages_that_are_on_their_way() -> None:
    probe = Probe()
    assert ask(probe, [HIT, PENDING, PENDING, MISS], 0) == [PENDING, PENDING, PENDING, MISS]
    assert ask(probe, [HIT, PENDING, PENDING, MISS], 1) == [HIT, PENDING, MISS]
    assert ask(probe, [HIT, HIT, HIT, MISS], 2) == [HIT, HIT, MISS]


def test_nothing_is_chosen_while_a_tier_does_not_know() -> None:
    probe = Probe()
    assert ask(probe, [HIT, RETRY, RETRY], 0) == [PENDING, RETRY, RETRY]
    assert ask(probe, [HIT, PENDING, PENDING], 1) == [PENDING, PENDING, PENDING]
    assert ask(probe, [HIT, HIT, HIT], 2) == [HIT, HIT, MISS]


def test_no_hit_no_probe() -> None:
    probe = Probe()
    for step in range(3):
        assert ask(probe, [MISS], step) == [MISS]
    assert not probe.target


@given(st.lists(st.lists(st.sampled_from([HIT, PENDING, RETRY, MISS]), min_size=1), min_size=1))
def test_never_more_than_one_page_is_withheld(steps: list[list[Answer]]) -> None:
    probe, target = Probe(), b""
    for step, natural in enumerate(steps):
        for index, answer in enumerate(natural):
            key = bytes([index])
            told = probe.answer(key, answer, step)
            target = target or probe.target
            assert probe.target == target, "it does not change"
            if key == target:
                assert told is MISS
            else:
                assert told is answer or (answer is HIT and told is PENDING and not target)
