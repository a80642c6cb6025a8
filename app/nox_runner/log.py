"""Log lines of the runner: one JSON object per line on stderr, which is the journal."""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone

_ORDER = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_threshold = _ORDER["info"]


def set_level(level: str) -> None:
    """Drop lines below `level`: debug, info, warning or error."""
    global _threshold
    _threshold = _ORDER[level]


def log(level: str, event: str, **fields: object) -> None:
    """Write one line. `event` is a short name; `fields` never hold code, env or a token."""
    if _ORDER[level] < _threshold:
        return
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    line = json.dumps({"time": now, "level": level, "event": event, **fields}, default=str)
    try:
        # One write per line, so that lines of several threads never mix.
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    except OSError:
        pass  # the journal is gone; runs are worth more than its lines
