"""The front's settings: what both services share, and the token."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone

from nox_runner import settings as shared
from nox_runner.settings import (
    PREVIOUS_KEY,
    PREVIOUS_UNTIL_KEY,
    TOKEN_KEY,
    Assignment,
    Settings,
    SettingsError,
)

DEFAULT_PATH = "/run/nox-api/settings"
MIN_TOKEN = 32
"""Characters."""

_PLACEHOLDERS = ("replace", "changeme", "change_me", "change-me", "placeholder", "your_token",
                 "your-token", "secure_token", "insert_", "<")  # fmt: skip
_HELP = "make one with: sudo openssl rand -hex 32"
_log = logging.getLogger("nox.settings")


@dataclass(frozen=True)
class FrontSettings(Settings):
    """`token` is the bearer token; it is kept out of every repr.

    While clients change over, `previous` is accepted beside it: until `previous_until` (seconds
    since the epoch), or as long as it is set.
    """

    token: str = field(default="", repr=False)
    previous: str = field(default="", repr=False)
    previous_until: float | None = None

    def tokens(self) -> tuple[str, ...]:
        """What is accepted now."""
        over = self.previous_until is not None and time.time() >= self.previous_until
        return (self.token,) if not self.previous or over else (self.token, self.previous)


def load(path: str) -> FrontSettings:
    """Read the file at `path`; SettingsError names line, key and cause, never a token."""
    assignments = shared.read(path)
    settings = shared.build(FrontSettings, assignments, path)
    token = _token(assignments, path, TOKEN_KEY)
    if not token:
        raise SettingsError(f"{path}: {TOKEN_KEY}: is not set; {_HELP}")
    previous = _token(assignments, path, PREVIOUS_KEY)
    until = _time(assignments, path)
    for message in shared.warnings(assignments, path):
        _log.warning("settings", extra={"fields": {"reason": message}})
    return replace(settings, token=token, previous=previous, previous_until=until)


def _token(assignments: list[Assignment], path: str, key: str) -> str:
    given = [assignment for assignment in assignments if assignment.key == key]
    if not given or not given[-1].value:
        return ""
    token, line = given[-1].value, given[-1].line
    if any(word in token.lower() for word in _PLACEHOLDERS):
        cause = "is a placeholder"
    elif len(token) < MIN_TOKEN:
        cause = f"is shorter than {MIN_TOKEN} characters"
    elif not token.isascii() or not token.isprintable() or " " in token:
        cause = "must be printable ASCII without spaces"
    else:
        return token
    raise SettingsError(f"{path}:{line}: {key}: {cause}; {_HELP}")


def _time(assignments: list[Assignment], path: str) -> float | None:
    given = [assignment for assignment in assignments if assignment.key == PREVIOUS_UNTIL_KEY]
    if not given or not given[-1].value:
        return None
    try:
        found = datetime.strptime(given[-1].value, "%Y-%m-%dT%H:%M:%SZ")
    except ValueError:
        cause = "must be a time in UTC, such as 2030-01-31T12:00:00Z"
        raise SettingsError(f"{path}:{given[-1].line}: {PREVIOUS_UNTIL_KEY}: {cause}") from None
    return found.replace(tzinfo=timezone.utc).timestamp()
