"""A client's connection that outlives this process while nothing is under way on it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from nox_runner import systemd

STORED = "connection"
"""The name of handed-on connections in systemd's descriptor store."""
_HEADER_SECONDS = 5.0
_MAX_HEAD = 64 << 10
"""Bytes of a request's line and headers. They are kept before anybody has shown a token."""
_HEAD_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"Content-Length: 0\r\nConnection: close\r\n\r\n"
)


@dataclass
class Handover:
    """Whether the stop has begun."""

    begun: bool = False


class Connection(HttpToolsProtocol):
    """uvicorn's connection, but at a stop no request that was sent on it is lost.

    A server that closes an idle connection may meet a request on its way, which nobody may repeat
    if it is a POST. So an idle one is not closed: its socket goes to the next process, with what
    has arrived on it and was not read. Where a request has begun, it is answered first.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        handover: Handover,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._handover = handover
        self._in_request = False
        """Between the first byte of a request and its last."""
        self._head: int | None = None
        """Bytes that came of a head that has begun, without its first piece; None if none has."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Also of one that was accepted just before the stop, and comes after it."""
        super().connection_made(transport)
        if self._handover.begun:
            self.shutdown()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol; no head may be without end."""
        before = self._head
        super().data_received(data)
        if before is not None and self._head == before:
            self._head += len(data)
            if self._head > _MAX_HEAD and not self.transport.is_closing():
                self.transport.write(_HEAD_TOO_LARGE)
                self.transport.close()

    def on_message_begin(self) -> None:
        """See httptools."""
        self._in_request = True
        self._head = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """See httptools."""
        self._head = None
        super().on_headers_complete()
        if self._handover.begun:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """See httptools."""
        self._in_request = False
        super().on_message_complete()

    def shutdown(self) -> None:
        """The server stops: hand on, or answer what has begun and close."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering:
            self.cycle.keep_alive = False
        elif self._in_request:
            # Bytes of a head were read: it has to be read to its end here, if that comes.
            self.loop.call_later(_HEADER_SECONDS, self._close_unless_answering)
        elif not self.transport.is_closing():
            # Without a manager that keeps it, this closes it.
            systemd.store(STORED, [self.transport.get_extra_info("socket").fileno()])
            self.transport.abort()

    def _close_unless_answering(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
