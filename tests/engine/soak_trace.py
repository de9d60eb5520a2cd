"""Traffic for the soak test: conversations about shared documents, from a seed."""

import random
from dataclasses import dataclass, field
from typing import Any

from tests.engine.driver import prompt

LONGEST_PROMPT = 520  # tokens; then a conversation ends
CALM = 0.6  # share of the requests without parameters


@dataclass
class Batch:
    """Requests that run together, and what happens to them; see `EngineProcess.run`."""

    requests: list[dict[str, Any]]
    events: list[dict[str, Any]]
    answers: list[list[int]] = field(default_factory=list)  # of an engine without offload


class Trace:
    """A few system prompts, several documents, conversations that grow.

    A conversation continues with the answer it was given, so each batch needs the answers
    of the one before it.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._systems = [self._text(length) for length in (40, 64, 96)]
        self._documents = [self._text(self._random.randint(100, 260)) for _ in range(5)]
        self._conversations = [self._opening() for _ in range(6)]
        self._asked: list[int] = []

    def next(self) -> Batch:
        """One to four requests of different conversations, with what happens to them."""
        choose = self._random
        self._asked = choose.sample(range(len(self._conversations)), choose.randint(1, 4))
        requests = []
        for index in self._asked:
            self._conversations[index] += self._text(choose.randint(10, 60))
            requests.append(
                {
                    "prompt": self._conversations[index],
                    "max_tokens": choose.randint(2, 24),
                    "params": self._params(),
                    "arrives": choose.choice((0, 0, 1, 3)),
                }
            )
        return Batch(requests, self._events(len(requests)))

    def learn(self, batch: Batch, answers: list[list[int]]) -> None:
        """The answers to the batch made last."""
        batch.answers = answers
        for index, tokens in zip(self._asked, answers, strict=True):
            self._conversations[index] += "".join(map(chr, tokens))
            if len(self._conversations[index]) > LONGEST_PROMPT:
                self._conversations[index] = self._opening()

    def _text(self, length: int) -> str:
        return prompt(self._random.getrandbits(32), length)

    def _opening(self) -> str:
        return self._random.choice(self._systems) + self._random.choice(self._documents)

    def _events(self, requests: int) -> list[dict[str, Any]]:
        choose = self._random
        events: list[dict[str, Any]] = []
        when: list[int | str] = [1, 4, "promotion", "load", "store"]
        if choose.random() < 0.25:
            request = choose.randrange(requests)
            events.append({"when": choose.choice(when), "do": "abort", "request": request})
        if choose.random() < 0.2:
            connector = choose.random() < 0.5
            events.append({"when": choose.choice(when), "do": "reset", "connector": connector})
        return events

    def _params(self) -> dict[str, Any] | None:
        """`kv_transfer_params`: mostly none, else sensible or nonsense."""
        choose = self._random
        if choose.random() < CALM:
            return None
        length = choose.randrange(0, LONGEST_PROMPT)
        return choose.choice(
            [
                {"max_offload_tokens": length},
                {"max_load_tokens": length},
                {"kv_load_tiers": choose.choice([[], [{"medium": "storage"}]])},
                {"kvstrata": {"persist": False}},
                {"kvstrata": {"tiers": ["SoakTier"], "pin_seconds": choose.random() / 4}},
                {"max_offload_tokens": "many", "max_load_tokens": -3, "kv_load_tiers": "all"},
                {"kv_load_tiers": [{"medium": "floppy"}, 7], "kvstrata": 7, "unknown": [None]},
                {"kvstrata": {"persist": "perhaps", "tiers": {"a": 1}, "pin_seconds": -1}},
                {"kvstrata": {"tiers": ["nowhere", 3], "pin_seconds": "long", "other": {}}},
            ]
        )
