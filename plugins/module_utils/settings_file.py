# SPDX-License-Identifier: Apache-2.0
"""The syntax of /etc/default/nox-api, how it is written, and what makes a token acceptable."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

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


def assign(text: str, name: str, value: str, comment: str) -> str:
    """Sets a key where it stands (its last assignment counts), or adds it at the end."""
    lines = text.splitlines()
    places = [i for i, line in enumerate(lines) if (m := LINE.match(line)) and m.group(1) == name]
    if places:
        lines[places[-1]] = f"{name}={value}"
    else:
        if comment:
            lines += ["", f"# {comment}"]
        lines.append(f"{name}={value}")
    return "".join(f"{line}\n" for line in lines)


def read_written(path: Path) -> dict[str, Any]:
    """What the roles wrote into the settings last: `token_sha256`, and `values` by key. Empty where that isn't on record:
    whatever the file says was then written by somebody else."""
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return written if isinstance(written, dict) and isinstance(written.get("values", {}), dict) else {}


def write_private(path: Path, text: str) -> None:
    """Writes through a temporary file of mode 0600 in the same directory, then renames."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
            os.fchown(descriptor, 0, 0)
            handle.write(text)
            handle.flush()
            os.fsync(descriptor)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
