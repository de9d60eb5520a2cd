"""Probe: a request whose last hit is answered MISS on purpose, so that the engine computes it."""

from __future__ import annotations

from dataclasses import dataclass

from kvstrata.offload.finding.lookup import Answer
from kvstrata.tiers.base import PageKey

# Members bound once: in Python 3.11 each `Answer.HIT` is a call.
_HIT, _PENDING, _RETRY, _MISS = Answer.HIT, Answer.PENDING, Answer.RETRY, Answer.MISS


@dataclass(slots=True)
class Probe:
    """One request's look-ups, step by step, until its last hit is known.

    A look-up does not tell whether another one follows. So what is here is answered PENDING at
    first, vLLM asks again in its next step, and then the last page of the step before is known to
    be the prefix's last. That holds for full attention alone, whose look-ups go from the start of
    the prompt to the first miss.
    """

    target: PageKey = b""  # the key that is answered MISS; empty while it is not known
    withheld: bool = False  # that it was, for the caller to note
    _step: int = -1
    _last: PageKey = b""  # last key of this step's hits
    _open: bool = False  # a tier did not know yet, so that more hits may follow

    def answer(self, key: PageKey, natural: Answer, step: int) -> Answer:
        """What to tell vLLM of a key, in place of the `natural` answer in this step."""
        if step != self._step:
            if self._step >= 0 and self._last and not self._open and not self.target:
                self.target = self._last
            self._step, self._last, self._open = step, b"", False
        if key == self.target:
            return _MISS
        if natural is _RETRY:
            self._open = True
        elif natural is not _MISS:
            self._last = key
        return _PENDING if natural is _HIT and not self.target else natural
