# SPDX-License-Identifier: Apache-2.0
"""The kernel's settings below /proc/sys: as they are, and whether this host may change them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from . import brought, host_files

FILE = "/etc/sysctl.d/60-nox.conf"
RECORD = "kernel"
SYS = Path("/proc/sys")


def place(name: str) -> Path:
    return SYS / name.replace(".", "/")


def value(name: str) -> str | None:
    """None: this kernel has no such setting."""
    try:
        return place(name).read_text(encoding="ascii").strip()
    except OSError:
        return None


def refused(name: str) -> str:
    """Why this host can't have it, "" if it can: a container shares its kernel with others, and sees it read-only."""
    if value(name) is None:
        return "this kernel has no such setting"
    return "" if os.access(place(name), os.W_OK) else "read-only here: the kernel is shared with other hosts"


def set_value(name: str, wanted: str) -> None:
    place(name).write_text(f"{wanted}\n", encoding="ascii")


def take_back(names: list[str] | None = None) -> list[str]:
    """Sets what Nox has set (all, or these) to what it was, where nobody else has set it since; what was done."""
    before: dict[str, Any] = brought.read().get(RECORD, {})
    done = []
    for name in list(before) if names is None else [name for name in names if name in before]:
        entry = before.pop(name)
        if value(name) == entry["set"] and entry["set"] != entry["was"]:
            set_value(name, entry["was"])
            done.append(f"{name} = {entry['was']}")
    brought.replace(RECORD, before)
    return done


def wanted() -> dict[str, str]:
    """Name → value, as the file says."""
    pairs = [
        line.split("=", 1) for line in (host_files.read(FILE) or "").splitlines() if "=" in line and line[0] != "#"
    ]
    return {name.strip(): text.strip() for name, text in pairs}
