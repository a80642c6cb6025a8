# SPDX-License-Identifier: Apache-2.0
"""What decides which release archive a host needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def release_target(host: dict[str, Any]) -> str:
    """The facts of M(nox.platform.nox_host) → "3.10 x86_64"."""
    return f"{host['python']} {host['arch']}"


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"release_target": release_target}
