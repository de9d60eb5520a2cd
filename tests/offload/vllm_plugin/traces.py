"""Random traces of requests: conversations on shared beginnings, among prompts that come once."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tests.offload.vllm_plugin.block_engine import BLOCK, TOKEN, Prompt

ROUNDS = 40
_MOST = 24 * BLOCK  # tokens of a prompt


def trace(seed: int) -> Sequence[Sequence[Prompt]]:
    """Rounds of prompts that come together; the same for the same seed."""
    choose = random.Random(seed)

    def text(least: int, most: int) -> list[int]:
        return [choose.randrange(8, 200) for _ in range(choose.randint(least, most) * BLOCK // 2)]

    systems = [text(4, 10) for _ in range(2)]
    conversations: list[list[int]] = []

    def prompt() -> Prompt:
        kind = choose.random()
        generate = choose.choice((1, 1, 2, 18))
        abort_after = choose.randrange(8) if choose.random() < 0.1 else None
        if kind < 0.2:
            return Prompt(text(8, 40), generate, abort_after)
        if kind < 0.4 or not conversations:
            conversations.append(choose.choice(systems) + text(1, 8))
        at = choose.randrange(len(conversations))
        asked = Prompt(conversations[at], generate, abort_after)
        conversations[at] = [*asked.tokens, *[TOKEN] * generate, *text(1, 6)]
        if len(conversations[at]) > _MOST:
            del conversations[at]
        return asked

    return [[prompt() for _ in range(choose.choice((1, 1, 2, 3)))] for _ in range(ROUNDS)]
