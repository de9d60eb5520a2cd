"""Small traces in the published forms: `python -m kvstrata.offload.simulate.generate mooncake`.

Chats begin as a Poisson process, each with one of a few system prompts, of which the first is the
most popular. In each turn a chat sends all of its past, and what the user writes.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from kvstrata.offload.simulate.traces import BAILIAN_TOKENS, MOONCAKE_TOKENS

MOONCAKE, BAILIAN = "mooncake", "bailian"
FORMS = (MOONCAKE, BAILIAN)


@dataclass(frozen=True)
class Chats:
    """What the chats are like; lengths in tokens, times in seconds, and means where they vary.

    Attributes:
        chats: how many.
        seed: of all that is random.
        per_second: how many begin.
        systems, system_tokens: system prompts, and how long each is.
        turns, question_tokens, answer_tokens: of a chat.
        pause_s: until the user has read an answer and asks on.
    """

    chats: int = 300
    seed: int = 0
    per_second: float = 0.5
    systems: int = 4
    system_tokens: int = 2048
    turns: float = 4.0
    question_tokens: int = 900
    answer_tokens: int = 300
    pause_s: float = 60.0


def generate(form: str, chats: Chats = Chats()) -> Iterator[str]:
    """The lines of a trace of one of `FORMS`; the same for the same chats."""
    choose = random.Random(chats.seed)
    tokens = MOONCAKE_TOKENS if form == MOONCAKE else BAILIAN_TOKENS
    turns: list[tuple[float, int, int, Mapping[str, Any]]] = []
    begin = 0.0
    for chat in range(chats.chats):
        begin += choose.expovariate(chats.per_second)
        turns += [(row["at"], chat, row["turn"], row) for row in _chat(choose, chats, begin)]
    turns.sort(key=lambda each: each[:3])
    numbers: dict[object, int] = {}
    ids: dict[tuple[int, int], int] = {}
    for number, (at, chat, turn, row) in enumerate(turns):
        hashes = [
            numbers.setdefault(name, len(numbers)) for name in _blocks(chat, row, tokens, chats)
        ]
        ids[chat, turn] = number
        line = {
            "timestamp": round(1000 * at) if form == MOONCAKE else round(at, 3),
            "input_length": row["input"],
            "output_length": row["output"],
            "hash_ids": hashes,
        }
        if form == BAILIAN:
            parent = ids.get((chat, turn - 1), -1)
            line |= {"chat_id": number, "parent_chat_id": parent, "type": "text", "turn": turn}
        yield json.dumps(line)


def _chat(choose: random.Random, chats: Chats, at: float) -> Iterator[dict[str, Any]]:
    weights = accumulate(1 / rank for rank in range(1, chats.systems + 1))
    (system,) = choose.choices(range(chats.systems), cum_weights=list(weights))
    past, turn = chats.system_tokens, 1
    while True:
        past += 1 + int(choose.expovariate(1 / chats.question_tokens))
        output = 1 + int(choose.expovariate(1 / chats.answer_tokens))
        yield {"at": at, "turn": turn, "system": system, "input": past, "output": output}
        if choose.random() < 1 / chats.turns:
            return
        past += output
        turn += 1
        at += choose.expovariate(1 / chats.pause_s)


def _blocks(chat: int, row: Mapping[str, Any], tokens: int, chats: Chats) -> Iterator[object]:
    """What tells each block of a prompt from others."""
    for start in range(0, row["input"], tokens):
        end = start + tokens
        if end <= chats.system_tokens:
            yield "system", row["system"], start
        elif end <= row["input"]:
            yield "chat", chat, start
        else:  # it is not full, and another one in the next turn
            yield "chat", chat, start, row["turn"]


def main(arguments: list[str]) -> None:
    """Print a trace: FORM, and perhaps how many chats, and a seed."""
    form, *numbers = arguments or [""]
    try:
        if form not in FORMS or len(numbers) > 2:
            raise ValueError
        names = dict(zip(("chats", "seed"), map(int, numbers), strict=False))
    except ValueError:
        sys.exit(f"give {' or '.join(FORMS)}, then how many chats (300), and a seed (0)")
    for line in generate(form, Chats(**names)):
        print(line)


if __name__ == "__main__":
    main(sys.argv[1:])
