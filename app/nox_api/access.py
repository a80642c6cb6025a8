"""One log line per request, and the request's id."""

from __future__ import annotations

import ipaddress
import logging
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_log = logging.getLogger("nox.access")
_NOTES = "nox.notes"
_MAX_PATH = 512
_FULL = 507
"""The sandbox's quota is used up: nothing is wrong with the service."""

Observe = Callable[[Scope, int, float], None]
"""Told scope, status and seconds of each request at its end."""


def note(scope: Scope, **fields: object) -> None:
    """Add `fields` to the log line of the request."""
    scope.setdefault(_NOTES, {}).update(fields)


class AccessLog:
    """Logs each request at its end. Neither queries nor headers nor bodies are logged."""

    def __init__(self, app: ASGIApp, observe: Observe) -> None:
        self._app = app
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        request_id = uuid.uuid4().hex
        note(scope, request_id=request_id)
        status = 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            seconds = time.monotonic() - started
            self._observe(scope, status, seconds)
            level = logging.WARNING if status >= 500 and status != _FULL else logging.INFO
            fields = {
                "method": scope["method"],
                "path": scope["path"][:_MAX_PATH],
                "status": status,
                "duration_ms": round(seconds * 1000, 1),
                "client": client_address(scope),
                **scope[_NOTES],
            }
            _log.log(level, "request", extra={"fields": fields})


def client_address(scope: Scope) -> str:
    """The client's address; behind a proxy on this host the one that the proxy saw."""
    peer: str = scope["client"][0] if scope.get("client") else ""
    if not _is_loopback(peer):
        return peer
    forwarded = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
    if not forwarded:
        return peer
    # What stands before the last entry was sent by the client itself.
    last = forwarded[-1].decode("latin-1").rpartition(",")[2].strip()
    try:
        return str(ipaddress.ip_address(last))
    except ValueError:
        return peer


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
