"""What the prefiller stored in the shared tier, as its KV events say."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
import zmq.asyncio

logger = logging.getLogger("proxy")

Chunk = tuple[int, ...]  # the tokens of a page


class Watch:
    """The chunks that were stored since a request began."""

    def __init__(self) -> None:
        self.chunks: set[Chunk] = set()
        self.more = asyncio.Event()


class Stored:
    """Tells requests that wait what the tier got.

    Args:
        tier: its name in the events: its type, `fs-2` for the second of a type.
    """

    def __init__(self, tier: str) -> None:
        self._tier = tier
        self._size = 1  # tokens of a chunk, as the events say
        self._watches: set[Watch] = set()
        self._silent = False  # a wait was in vain, and nothing came since

    async def follow(self, socket: zmq.asyncio.Socket) -> None:
        """Take what vLLM's publisher sends, for ever."""
        while True:
            *_, payload = await socket.recv_multipart()
            try:
                _, events, *_ = msgspec.msgpack.decode(payload)
                chunks = {chunk for event in events if (chunk := self._chunk(event))}
            except (msgspec.DecodeError, KeyError, TypeError, ValueError):
                logger.warning("what came is no batch of vLLM's KV events")
                continue
            if chunks:
                self._take(chunks)

    @contextmanager
    def watch(self) -> Iterator[Watch]:
        """From now on, what is stored is remembered for one request."""
        watch = Watch()
        self._watches.add(watch)
        try:
            yield watch
        finally:
            self._watches.discard(watch)

    async def wait(
        self, watch: Watch, prompts: Sequence[Sequence[int]], cached: int, longest_s: float
    ) -> None:
        """Wait until all is stored that was computed of the prompts.

        Args:
            watch: of the request, from before it was sent.
            prompts: token ids.
            cached: how many of the tokens were not computed; they were stored before.
            longest_s: give up then, in seconds. While the tier gets nothing, at once.
        """
        try:
            async with asyncio.timeout(0 if self._silent else longest_s):
                while self._missing(watch, prompts) > cached:
                    await watch.more.wait()
                    watch.more.clear()
        except TimeoutError:
            if not self._silent:
                logger.warning("pages are late in the tier %s; the decoder computes", self._tier)
            self._silent = True

    def _take(self, chunks: set[Chunk]) -> None:
        self._size = len(next(iter(chunks)))
        self._silent = False
        for watch in self._watches:
            watch.chunks |= chunks
            watch.more.set()

    def _chunk(self, event: dict[str, Any]) -> Chunk:
        """The tokens of a chunk that the tier got; none for events of other things."""
        if event["type"] != "BlockStored" or event.get("ownership") != self._tier:
            return ()
        return tuple(event["token_ids"])

    def _missing(self, watch: Watch, prompts: Sequence[Sequence[int]]) -> int:
        """Tokens of whole chunks that were not stored; the last token is always computed anew."""
        size = self._size
        return sum(
            size
            for prompt in prompts
            for start in range(0, len(prompt) - size, size)
            if tuple(prompt[start : start + size]) not in watch.chunks
        )
