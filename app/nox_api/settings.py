"""The front's settings: what both services share, and the token."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

from nox_runner import settings as shared
from nox_runner.settings import TOKEN_KEY, Assignment, Settings, SettingsError

DEFAULT_PATH = "/run/nox-api/settings"
MIN_TOKEN = 32
"""Characters."""

_PLACEHOLDERS = ("replace", "changeme", "change_me", "change-me", "placeholder", "your_token",
                 "your-token", "secure_token", "insert_", "<")  # fmt: skip
_HELP = "make one with: sudo openssl rand -hex 32"
_log = logging.getLogger("nox.settings")


@dataclass(frozen=True)
class FrontSettings(Settings):
    """`token` is the bearer token; it is kept out of every repr."""

    token: str = field(default="", repr=False)


def load(path: str) -> FrontSettings:
    """Read the file at `path`; SettingsError names line, key and cause, never a token."""
    assignments = shared.read(path)
    settings = shared.build(FrontSettings, assignments, path)
    token = _token(assignments, path)
    for message in shared.warnings(assignments, path):
        _log.warning("settings", extra={"fields": {"reason": message}})
    return replace(settings, token=token)


def _token(assignments: list[Assignment], path: str) -> str:
    given = [assignment for assignment in assignments if assignment.key == TOKEN_KEY]
    if not given or not given[-1].value:
        raise SettingsError(f"{path}: {TOKEN_KEY}: is not set; {_HELP}")
    token, line = given[-1].value, given[-1].line
    if any(word in token.lower() for word in _PLACEHOLDERS):
        cause = "is a placeholder"
    elif len(token) < MIN_TOKEN:
        cause = f"is shorter than {MIN_TOKEN} characters"
    elif not token.isascii() or not token.isprintable() or " " in token:
        cause = "must be printable ASCII without spaces"
    else:
        return token
    raise SettingsError(f"{path}:{line}: {TOKEN_KEY}: {cause}; {_HELP}")
