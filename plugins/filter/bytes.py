# SPDX-License-Identifier: Apache-2.0
"""Sizes as the settings file writes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}


def to_bytes(size: str | int) -> int:
    """ "16M" → 16777216; a plain number is bytes. Raises ValueError on anything else."""
    text = str(size).strip().upper()
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("K", "M", "G") else (text, "")
    return int(number) * UNITS[unit]


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"bytes": to_bytes}
