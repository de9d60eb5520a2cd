"""Traces are recognised by what is in them; a wrong line is one clear error."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from kvstrata.offload.simulate.generate import BAILIAN, FORMS, MOONCAKE, Chats, generate
from kvstrata.offload.simulate.traces import TraceError, parse_trace, read_trace

HEADER = {"kvstrata_recording": 1, "tokens_per_chunk": 32, "bytes_per_chunk": 640, "model": "m"}
FEW = Chats(chats=20)


def line(hashes: Sequence[object], tokens: int, at: float = 0, **more: object) -> str:
    row = {"timestamp": at, "input_length": tokens, "output_length": 5, "hash_ids": hashes}
    return json.dumps({**row, **more})


def test_mooncakes() -> None:
    trace = parse_trace("t", [line([7, 8], 700, 1000), line([7, 8, 9], 1536, 3500)])
    first, second = trace.requests
    assert (trace.tokens_per_chunk, trace.bytes_per_chunk, trace.chunks) == (512, None, 4)
    assert (first.at, second.at) == (0.0, 2.5)
    assert (first.tokens, first.generated) == (700, 5)
    # the second block of 700 tokens is not full
    assert len(first.keys) == 1 and second.keys[:1] == first.keys


def test_bailians_are_in_seconds_and_of_16_tokens() -> None:
    more = {"chat_id": 3, "parent_chat_id": -1, "type": "text", "turn": 1}
    trace = parse_trace("t", [line([1, 2], 32, 61.5, **more), line([1, 3], 40, 63.0, **more)])
    assert trace.tokens_per_chunk == 16
    assert [request.at for request in trace.requests] == [0.0, 1.5]
    assert trace.requests[0].keys[0] == trace.requests[1].keys[0]


def test_our_own_says_how_large_pages_are() -> None:
    lines = [json.dumps(HEADER), line(["00ff", "1234"], 64), "", line(["00ff"], 33, 10)]
    trace = parse_trace("t", lines)
    assert (trace.tokens_per_chunk, trace.bytes_per_chunk, trace.model) == (32, 640, "m")
    assert trace.chunks == 3
    joined = parse_trace("t", lines, tokens_per_chunk=64)
    assert (joined.tokens_per_chunk, joined.bytes_per_chunk, joined.chunks) == (64, 1280, 1)


def test_our_own_says_what_was_generated() -> None:
    lines = [json.dumps(HEADER), line(["a", "b", "c", "d"], 70), line(["a", "b", "c"], 96)]
    first, second = parse_trace("t", lines).requests
    assert (len(first.keys), len(first.behind)) == (2, 2)
    assert (second.keys, second.behind) == ([*first.keys, first.behind[0]], [])
    joined = parse_trace("t", lines, tokens_per_chunk=64).requests[0]
    assert (len(joined.keys), len(joined.behind)) == (1, 1)
    # of another form the last one may be of a block that is not full
    assert not parse_trace("t", [line([1, 2], 600)]).requests[0].behind


def test_a_hash_alone_is_no_key() -> None:
    """Of a block whose prefix is another one the KV is, too."""
    one, two = parse_trace("t", [line([1, 5], 1024), line([2, 5], 1024)]).requests
    assert set(one.keys).isdisjoint(two.keys)


def test_lines_may_be_out_of_order() -> None:
    trace = parse_trace("t", [line([1], 512, 900), line([1], 512, 100)])
    assert [request.at for request in trace.requests] == [0.0, 0.8]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("{", "it is no JSON"),
        ("[1]", "it is no object"),
        (line([1], 0), "input_length: 0"),
        (
            line([1], 10**12),
            "input_length: 1000000000000; give a whole number from 1 to 2,147,483,647",
        ),
        (line([1], 512).replace("512", '"512"'), "input_length: '512'"),
        (line([1], 512).replace('"output_length": 5, ', ""), "output_length: None"),
        (
            line([1], 512, output_length=10**12),
            "output_length: 1000000000000; give a whole number from 0 to 2,147,483,647",
        ),
        (line([1], 512, -1), "timestamp: -1"),
        (line([1], 512).replace('"timestamp": 0', '"timestamp": NaN'), "timestamp: nan"),
        (line([1.5], 512), "hash_ids: [1.5]"),
        (line([1], 1024), "hash_ids: 1 for 1024 tokens"),
    ],
)
def test_a_wrong_line_is_named(wrong: str, said: str) -> None:
    with pytest.raises(TraceError) as caught:
        parse_trace("a.jsonl", [line([1], 512), "", f"{wrong}\n"])
    assert f"a.jsonl: line 3: {said}" in str(caught.value)
    assert "; give " in str(caught.value)


def test_a_last_line_that_was_cut_is_left_out() -> None:
    whole = f"{line([1], 512)}\n"
    cut = parse_trace("a.jsonl", [whole, whole, whole[:40]])
    assert (len(cut.requests), cut.cut_line) == (2, 3)
    # with no newline at its end, and yet whole
    assert parse_trace("a.jsonl", [whole, whole.rstrip()]).cut_line is None
    with pytest.raises(TraceError, match="line 1: it is no JSON"):
        parse_trace("a.jsonl", ["no trace at all"])


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "there is no request in it"),
        ([json.dumps(HEADER)], "there is no request in it"),
        ([json.dumps({**HEADER, "kvstrata_recording": 2})], "line 1: kvstrata_recording: 2"),
        ([json.dumps({**HEADER, "tokens_per_chunk": 0})], "line 1: tokens_per_chunk: 0"),
    ],
)
def test_a_wrong_file_is_named(lines: list[str], said: str) -> None:
    with pytest.raises(TraceError, match=f"a.jsonl: {said}"):
        parse_trace("a.jsonl", lines)


@pytest.mark.parametrize("tokens", [16, 700])
def test_chunks_are_made_of_whole_hashes(tokens: int) -> None:
    with pytest.raises(TraceError, match=f"a chunk cannot have {tokens}; give a multiple of 512"):
        parse_trace("t", [line([1], 512)], tokens)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_generated_is_read(form: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(generate(form, FEW)))
    trace = read_trace(str(path))
    assert trace.tokens_per_chunk == {MOONCAKE: 512, BAILIAN: 16}[form]
    assert all(one.at <= two.at for one, two in pairwise(trace.requests))
    keys = [key for request in trace.requests for key in request.keys]
    # turns send their chat's past again, and chats share system prompts
    assert len(set(keys)) < 0.6 * len(keys)
    firsts = {request.keys[0] for request in trace.requests}
    assert 1 < len(firsts) <= FEW.systems


def test_the_generator_is_seeded() -> None:
    assert [*generate(BAILIAN, FEW)] == [*generate(BAILIAN, FEW)]
    assert [*generate(BAILIAN, FEW)] != [*generate(BAILIAN, Chats(chats=20, seed=1))]


def test_a_turn_names_the_one_before() -> None:
    rows = [json.loads(each) for each in generate(BAILIAN, FEW)]
    later = [row for row in rows if row["turn"] > 1]
    assert later
    for row in later:
        before = rows[row["parent_chat_id"]]
        assert before["turn"] == row["turn"] - 1
        whole = before["input_length"] // 16
        assert row["hash_ids"][:whole] == before["hash_ids"][:whole]
