# SPDX-License-Identifier: Apache-2.0
"""What Nox's roles brought to a host that wasn't theirs alone: packages, firewall rules. Uninstall goes by it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

PATH = Path("/var/lib/nox/brought.json")
TABLES = ("host_files", "kernel")  # the other parts are lists


def read() -> dict[str, Any]:
    """Empty where nothing is recorded; without parts of a shape that nobody here writes."""
    try:
        found = json.loads(PATH.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: part for name, part in found.items() if isinstance(part, dict if name in TABLES else list)}


def remember(name: str, things: list[str]) -> None:
    """Adds to the record; what is there stays, in its order."""
    replace(name, list(dict.fromkeys([*read().get(name, []), *things])))


def replace(name: str, value: Any) -> None:
    """One part of the record; an empty one is left out, and what is not there already is no reason to write."""
    if not value and name not in read():
        return
    found = {**read(), name: value}
    if not value:
        del found[name]
    PATH.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    temporary = PATH.with_name(f".{PATH.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
        handle.write(json.dumps(found, indent=1, sort_keys=True) + "\n")
    temporary.replace(PATH)
