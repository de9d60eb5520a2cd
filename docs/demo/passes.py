"""A pass over questions on one long text, and what must be true of it.

The questions come first in their prompts, so the prompts share no prefix, and the GPU cache holds
only one of them: each question pushes the one before out.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from server import BLOCK_SIZE, Answer, Server, serve_args
from show import console, step

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"
MODEL = CACHE / "smollm2-135m"

TEXT = (ROOT / "LICENSE").read_text()  # about 2,200 tokens
QUESTIONS = (
    "What must a person do who gives others a copy of the work?",
    "Who grants a patent license, and when does it end?",
    "Does the license permit the use of trademarks?",
)
ANSWER_TOKENS = 32
SERVE_ARGS = serve_args(max_model_len=2560)  # one prompt and its answer
MIN_SERVED = 0.9  # share of the prompt that a hit must serve


@dataclass(frozen=True)
class Row:
    """One pass over all questions."""

    name: str
    answers: list[Answer]
    offloaded_tokens: int  # of the cached tokens, those that came from kvstrata
    identical: bool  # the answers' tokens are those of the cold pass

    @property
    def prompt_tokens(self) -> int:
        return sum(answer.prompt_tokens for answer in self.answers)

    @property
    def cached_tokens(self) -> int:
        return sum(answer.cached_tokens for answer in self.answers)

    @property
    def pages(self) -> int:
        """Full blocks of the prompts, each of which is a page."""
        return sum((answer.prompt_tokens - 1) // BLOCK_SIZE for answer in self.answers)

    @property
    def ttft_s(self) -> float:
        return statistics.median(answer.ttft_s for answer in self.answers)


def run_pass(name: str, server: Server, cold: list[Answer] | None) -> Row:
    """Ask all questions in their order; `cold` are the answers to compare with."""
    before = server.offloaded_hits()
    answers = []
    for number, question in enumerate(QUESTIONS, start=1):
        with step(f"{name}: question {number} of {len(QUESTIONS)}"):
            answers.append(server.ask(f"{question}\n\n{TEXT}\n\n{question}", ANSWER_TOKENS))
        if cold is None:
            console.print(f"       [cyan]Q[/] {escape(question)}")
            console.print(f"       [cyan]A[/] {escape(' '.join(answers[-1].text.split()))} ...")
    expected = cold if cold is not None else answers
    identical = [a.token_ids for a in answers] == [a.token_ids for a in expected]
    return Row(name, answers, server.offloaded_hits() - before, identical)


def faults(rows: list[Row]) -> list[str]:
    """Say in plain sentences what is wrong with the passes; nothing if all is well."""
    cold, *hits = rows
    found = []
    if cold.cached_tokens:
        found.append(f"cold: {cold.cached_tokens} tokens came from a cache, so it was not cold.")
    for row in hits:
        for number, (got, want) in enumerate(zip(row.answers, cold.answers, strict=True), start=1):
            if got.token_ids != want.token_ids:
                found.append(f"{row.name}: question {number} has a WRONG answer: {got.text!r}")
                found.append(f"  instead of the cold run's: {want.text!r}")
            if got.cached_tokens < MIN_SERVED * got.prompt_tokens:
                served = f"{got.cached_tokens} of {got.prompt_tokens} prompt tokens"
                found.append(f"{row.name}: question {number} was served {served} from cache.")
        if row.offloaded_tokens < MIN_SERVED * row.prompt_tokens:
            found.append(f"{row.name}: only {row.offloaded_tokens} tokens came from kvstrata.")
    return found
