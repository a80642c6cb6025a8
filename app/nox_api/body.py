"""The limit on request bodies, declared or not, and what becomes of a body nobody reads."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nox_api.problem import ProblemError

_DRAIN_SECONDS = 10.0
_DRAIN_BYTES = 64 << 20


class BodyLimit:
    """Raises a 413 problem where the application reads beyond `limit()` bytes.

    When a response is given before the body was read to its end, the rest is read and dropped
    first, within bounds. A client, or a proxy, that is still sending when the connection ends
    often never sees the response: curl over HTTP/1.1 through Caddy lost every second one. Where
    the rest is beyond the bounds, the connection is closed after the response.
    """

    def __init__(self, app: ASGIApp, limit: Callable[[], int]) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(Headers(scope=scope), receive, send, self._limit())
        await self._app(scope, body.receive, body.send)


class _Body:
    def __init__(self, headers: Headers, receive: Receive, send: Send, limit: int) -> None:
        self._receive = receive
        self._send = send
        self._limit = limit
        length = headers.get("content-length", "0")
        self._declared = int(length) if length.isascii() and length.isdigit() else 0
        self._unread = self._declared > 0 or "transfer-encoding" in headers
        self._size = 0

    async def receive(self) -> Message:
        """The next message; a 413 instead of what is beyond the limit."""
        if self._unread and self._declared > self._limit:
            raise self._too_large()
        message = await self._next()
        if self._size > self._limit:
            raise self._too_large()
        return message

    async def send(self, message: Message) -> None:
        """Pass `message` on, after what is left of the body."""
        if message["type"] == "http.response.start" and self._unread:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._drain(), _DRAIN_SECONDS)
            if self._unread:
                MutableHeaders(scope=message)["Connection"] = "close"
        await self._send(message)

    async def _drain(self) -> None:
        end = self._size + _DRAIN_BYTES
        while self._unread and self._size < end:
            await self._next()

    async def _next(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._unread = False
        elif message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._unread = bool(message.get("more_body"))
        return message

    def _too_large(self) -> ProblemError:
        return ProblemError(413, f"The request body is larger than {self._limit} bytes")
