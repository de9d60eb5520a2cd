"""Savings: what hits are worth, in seconds of prefill."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping

from kvstrata.offload.metering.found import Takings

# A prefill of fewer tokens in one step says more of the step than of the tokens.
LEAST_TOKENS = 256
_PREFILLS = 64  # remembered
LEAST_PREFILLS = 5  # that make the speed known


class ShortPrefills:
    """Seconds per token of prefills that end within a step, where longer ones are not known.

    What a request computes in a step is known once the step is planned, and the step lasts until
    the next one is; where vLLM plans some steps ahead of the GPU, that is so of later ones.

    Args:
        ahead: how many steps vLLM plans ahead.
    """

    def __init__(self, ahead: int = 0) -> None:
        self._prefills: deque[tuple[int, float]] = deque(maxlen=_PREFILLS)  # tokens, seconds
        # Tokens of each prefill, of the steps that were planned and have not ended
        self._steps: deque[list[int]] = deque([[] for _ in range(ahead + 1)], maxlen=ahead + 1)
        self._planned = 0.0  # when the last one was

    def begins(self, tokens: int) -> None:
        """A request computes so many tokens in the step planned last, and none before it."""
        if tokens >= LEAST_TOKENS:
            self._steps[-1].append(tokens)

    def end_step(self, now: float) -> None:
        """A step was planned."""
        for tokens in self._steps[0]:
            self._prefills.append((tokens, now - self._planned))
        self._steps.append([])
        self._planned = now

    def seconds_per_token(self) -> float | None:
        """None while it is not known."""
        if len(self._prefills) < LEAST_PREFILLS:
            return None
        tokens, seconds = map(sum, zip(*self._prefills, strict=True))
        return seconds / tokens


class Savings:
    """Prices what requests were served.

    Args:
        seconds_per_token: of prefills that take several steps; None while it is not known.
        ahead: how many steps vLLM plans ahead of the GPU.

    Attributes:
        seconds: of prefill that were saved, by tier, None for the primary one. Tokens that were
            served before the speed was known are priced when it is.
        short: of prefills that take one step; they count where no others are known.
    """

    def __init__(self, seconds_per_token: Callable[[], float | None], ahead: int = 0) -> None:
        self._long = seconds_per_token
        self.short = ShortPrefills(ahead)
        self.seconds: defaultdict[str | None, float] = defaultdict(float)
        self._priced: Counter[str | None] = Counter()  # tokens

    def seconds_per_token(self) -> float | None:
        """What a token of a prompt takes to compute; None while it is not known."""
        return self._long() or self.short.seconds_per_token()

    def price(self, takings: Mapping[str | None, Takings]) -> None:
        """Price what was served since the last call."""
        per_token = self.seconds_per_token()
        if per_token is None:
            return
        for name, each in takings.items():
            self.seconds[name] += (each.hit_tokens - self._priced[name]) * per_token
            self._priced[name] = each.hit_tokens
