"""Log files of the front: JSON lines, safe to rotate under a running service."""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
from datetime import datetime, timezone
from io import TextIOWrapper
from pathlib import Path

_FILE_MODE = 0o640


class JsonLines(logging.Formatter):
    """One object per line: time (RFC 3339, UTC, ms), level, event, then the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        time = datetime.fromtimestamp(record.created, timezone.utc)
        document = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.name != "nox" and not record.name.startswith("nox."):
            document["logger"] = record.name
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document, default=str)


class RotatedFile(logging.handlers.WatchedFileHandler):
    """A log file that follows logrotate: a moved file is noticed at the next line."""

    def _open(self) -> TextIOWrapper:
        def opener(path: str, flags: int) -> int:
            return os.open(path, flags, _FILE_MODE)

        return open(self.baseFilename, "a", encoding="utf-8", opener=opener)


def configure(directory: str | None, level: str) -> None:
    """Log to `nox-api.log` and, from warnings on, to `error.log` in `directory` and to stderr.

    Without a directory everything goes to stderr. OSError if a file cannot be opened.
    """
    stderr = logging.StreamHandler()
    handlers: list[logging.Handler] = [stderr]
    if directory is not None:
        errors = RotatedFile(Path(directory, "error.log"))
        for quiet in (stderr, errors):
            quiet.setLevel(logging.WARNING)
        handlers += [RotatedFile(Path(directory, "nox-api.log")), errors]
    for handler in handlers:
        handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = handlers
    root.setLevel(logging.WARNING)  # of libraries
    set_level(level)


def set_level(level: str) -> None:
    """Drop lines of Nox below `level`: debug, info, warning or error."""
    logging.getLogger("nox").setLevel(level.upper())
