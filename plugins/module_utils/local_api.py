# SPDX-License-Identifier: Apache-2.0
"""The API of the host a module runs on, called with the token that lies there: it never leaves the host."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any

from .settings_file import parse_settings

CONFIG = Path("/etc/default/nox-api")


class Unanswered(Exception):
    """The front can't be asked; the message says why."""


def call(method: str, path: str, body: Any = None, seconds: float = 10.0) -> tuple[int, bytes]:
    """Status and body of one request to the front itself, not through the proxy.

    Raises Unanswered: no configuration, no token, nobody listens, no answer in `seconds`.
    """
    try:
        settings = parse_settings(CONFIG.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise Unanswered(f"{CONFIG}: {error.strerror}") from None
    address, port = settings.get("NOX_BIND_ADDR") or "127.0.0.1", settings.get("NOX_PORT") or "8080"
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)  # noqa: S104  where all are bound, loopback is
    token = settings.get("NOX_API_TOKEN", "")
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    try:
        connection = http.client.HTTPConnection(address, int(port), timeout=seconds)
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Unanswered(f"{address}:{port}: {error or type(error).__name__}") from None
