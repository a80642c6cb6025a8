"""The bearer token, before anything of the request's body is read."""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from nox_api import problem

_AUTHENTICATED = "nox.authenticated"
_CREDENTIALS = re.compile(rb"bearer +([^ ]+) *", re.IGNORECASE)


def is_authenticated(scope: Scope) -> bool:
    """Whether the request carried the token; only `GET /health` is served without."""
    return bool(scope.get(_AUTHENTICATED))


class BearerAuth:
    """Answers 401 unless there is exactly one Authorization header, and it holds the token."""

    def __init__(self, app: ASGIApp, tokens: Callable[[], tuple[str, ...]]) -> None:
        self._app = app
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        is_open = scope["path"] == "/health" and scope["method"] == "GET"
        scope[_AUTHENTICATED] = len(given) == 1 and self._matches(given[0])
        if scope[_AUTHENTICATED] or (is_open and not given):
            await self._app(scope, receive, send)
            return
        detail = "The bearer token is wrong" if given else "A bearer token is required"
        headers = {"WWW-Authenticate": "Bearer"}
        refusal = problem.response(401, detail, scope["path"], headers)
        await refusal(scope, receive, send)

    def _matches(self, header: bytes) -> bool:
        match = _CREDENTIALS.fullmatch(header)
        given = match[1] if match else b""
        matches = False
        for token in self._tokens():  # all of them: the time tells nobody which one was near
            matches |= hmac.compare_digest(given, token.encode("ascii"))
        return matches
