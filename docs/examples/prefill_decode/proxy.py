"""A proxy in front of two servers of one model that share a tier: one prefills, the other decodes.

A completion or chat request goes to the prefiller first, for one token. When the pages of its
prompt are in the tier, the request goes to the decoder, which loads them instead of computing, and
whose answer is passed on as it comes. If anything goes wrong before that, the decoder computes the
prompt itself. All other requests are the decoder's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import zmq
import zmq.asyncio
from aiohttp import web
from stored import Stored

logger = logging.getLogger("proxy")

PREFILLED = ("/v1/completions", "/v1/chat/completions")
# Of a request: what would make the answer longer than a token, or no plain JSON.
LONGER = {
    *("stream", "stream_options", "min_tokens", "max_completion_tokens", "n", "best_of", "echo"),
}
# Of one connection, not of a request or an answer.
HOP = {
    *("accept-encoding", "connection", "content-length", "host", "keep-alive", "te", "trailer"),
    *("transfer-encoding", "upgrade"),
}
# What reading an answer of another form raises.
NO_ANSWER = AttributeError, LookupError, TypeError, ValueError
LARGEST_BODY = 2**28
CONNECT_S = 2.0
REST_S = 5.0  # a prefiller that failed is left alone for so long


class Proxy:
    """What becomes of a request; for the arguments see `parser`."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._prefill, self._decode = arguments.prefill, arguments.decode
        self._events, self._patience = arguments.events, arguments.patience
        self._longest = aiohttp.ClientTimeout(arguments.longest_prefill, sock_connect=CONNECT_S)
        self._stored = Stored(arguments.tier)
        self._rests_until = 0.0
        self._session: aiohttp.ClientSession

    async def live(self, app: web.Application) -> AsyncIterator[None]:
        """Connections to the servers, and the socket for events, while the proxy runs."""
        with zmq.asyncio.Context() as context, context.socket(zmq.SUB) as socket:
            socket.linger = 0
            socket.subscribe(b"")
            socket.bind(self._events)
            following = asyncio.create_task(self._stored.follow(socket))
            async with aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
                headers={"Accept-Encoding": "identity"},
            ) as self._session:
                yield
            following.cancel()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """The decoder's answer: at once, or of a prompt when that was prefilled."""
        body = await request.read()
        if request.method == "POST" and request.path in PREFILLED:
            await self._prefilled(request, body)
        url, headers = self._decode + request.path_qs, _kept(request.headers)
        try:
            found = await self._session.request(request.method, url, data=body, headers=headers)
        except (aiohttp.ClientError, TimeoutError) as error:
            return web.json_response({"error": {"message": f"no decoder: {error!r}"}}, status=502)
        async with found:
            answer = web.StreamResponse(status=found.status, headers=_kept(found.headers))
            await answer.prepare(request)
            async for piece in found.content.iter_any():
                await answer.write(piece)
            await answer.write_eof()
        return answer

    async def _prefilled(self, request: web.Request, body: bytes) -> None:
        """Let the prefiller compute the prompt, and wait until the decoder can find its pages."""
        if time.monotonic() < self._rests_until:
            return
        try:
            asked = {key: value for key, value in json.loads(body).items() if key not in LONGER}
        except (AttributeError, ValueError):
            return  # the decoder will say what is wrong with it
        asked |= {"max_tokens": 1, "return_token_ids": True}
        url, headers = self._prefill + request.path_qs, _kept(request.headers)
        with self._stored.watch() as watch:
            try:
                async with self._session.post(
                    url, json=asked, headers=headers, timeout=self._longest
                ) as found:
                    if 400 <= found.status < 500:
                        return  # so will the decoder
                    found.raise_for_status()
                    prompts, cached = _computed(await found.json())
            except (aiohttp.ClientError, TimeoutError, *NO_ANSWER) as error:
                logger.warning("the prefiller failed (%r); the decoder computes", error)
                self._rests_until = time.monotonic() + REST_S
                return
            await self._stored.wait(watch, prompts, cached, self._patience)


def _computed(answer: Mapping[str, Any]) -> tuple[list[list[int]], int]:
    """The prompts as token ids, and how many of the tokens came from a cache."""
    prompts = [answer] if answer.get("prompt_token_ids") else answer["choices"]  # chat, or not
    details = answer["usage"].get("prompt_tokens_details") or {}
    return [each["prompt_token_ids"] for each in prompts], details.get("cached_tokens") or 0


def _kept(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers.items() if name.lower() not in HOP]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parsed = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parsed.add_argument("--prefill", required=True, help="the prefiller, http://HOST:PORT")
    parsed.add_argument("--decode", required=True, help="the decoder, http://HOST:PORT")
    parsed.add_argument("--tier", required=True, help="the shared tier's type, as in its JSON")
    parsed.add_argument(
        "--events",
        default="tcp://127.0.0.1:5557",
        help="where the prefiller's KV events arrive: the `endpoint` that it was given",
    )
    parsed.add_argument(
        "--patience",
        type=float,
        default=1.0,
        help="longest wait for pages after the prefiller's answer, in seconds",
    )
    parsed.add_argument(
        "--longest-prefill",
        type=float,
        default=60.0,
        help="longest wait for the prefiller's answer, in seconds",
    )
    parsed.add_argument("--host", default="127.0.0.1", help="where clients connect")
    parsed.add_argument("--port", type=int, default=8000)
    return parsed


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    arguments = parser().parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    proxy = Proxy(arguments)
    app = web.Application(client_max_size=LARGEST_BODY)
    app.cleanup_ctx.append(proxy.live)
    app.router.add_route("*", "/{path:.*}", proxy.answer)
    # A client that goes away takes its requests with it.
    web.run_app(app, host=arguments.host, port=arguments.port, handler_cancellation=True)


if __name__ == "__main__":
    main()
