# SPDX-License-Identifier: Apache-2.0
"""The syntax of /etc/default/nox-api, and what makes a token acceptable."""

from __future__ import annotations

import re

LINE = re.compile(r"^\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=(.*?)\s*$")

# What people leave standing in copied examples. Compared in lower case, whole value.
PLACEHOLDER = re.compile(r"(?i)^(replace|change|example|your|insert|placeholder|<).*|^(.)\2+$")
TOKEN_MIN_LENGTH = 32  # characters; DESIGN: shorter ones are refused


def unquote(value: str) -> str:
    """Takes off one pair of matching quotes."""
    if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    return value


def parse_settings(text: str) -> dict[str, str]:
    """Key → value of every assignment; the last one wins, as in a shell."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        match = LINE.match(line)
        if match:
            found[match.group(1)] = unquote(match.group(2))
    return found


def token_state(token: str | None) -> str:
    """Judges a token: "absent", "placeholder", "short", "malformed" or "ok"."""
    if not token:
        return "absent"
    if PLACEHOLDER.match(token):
        return "placeholder"
    if len(token) < TOKEN_MIN_LENGTH:
        return "short"
    if not re.fullmatch(r"[!-~]+", token):
        return "malformed"
    return "ok"
