# SPDX-License-Identifier: Apache-2.0
"""Packages that came with Nox: which of them nobody else needs, so that they can go."""

from __future__ import annotations

import re
from collections.abc import Callable

Ask = Callable[..., str]


def removable(ask: Ask, came: list[str], only: list[str] | None = None) -> tuple[list[str], list[str]]:
    """(what can go, what something else needs) of packages that came with Nox; of them all, or of some and what came along.

    `ask` runs a command and gives its output. apt says itself what nothing needs: what is its to remove when so marked.
    """
    shown = ask("dpkg-query", "--show", "--showformat", "${Package} ${db:Status-Status}\n")
    there = set(re.findall(r"(?m)^(\S+) installed$", shown))
    came = [name for name in came if name in there]
    wanted = [name for name in came if only is None or name in only]
    if not wanted:
        return [], []
    manual = set(ask("apt-mark", "showmanual", *wanted).split())
    marked = [name for name in wanted if name in manual]
    if marked:
        ask("apt-mark", "auto", *marked)
    try:
        # What others only recommend or suggest was not there before Nox, either; unless its removal takes others along.
        going = unneeded(ask, came, strict=False)
        if set(purged(ask("apt-get", "--simulate", "-q", "purge", *going))) - set(going):
            going = unneeded(ask, came, strict=True)
    finally:
        if marked:
            ask("apt-mark", "manual", *marked)
    return going, [name for name in wanted if name not in going]


def unneeded(ask: Ask, came: list[str], strict: bool) -> list[str]:
    options = [f"APT::AutoRemove::{kind}Important={str(strict).lower()}" for kind in ("Recommends", "Suggests")]
    words = [word for option in options for word in ("-o", option)]
    found = set(purged(ask("apt-get", "--simulate", "-q", "autoremove", "--purge", *words)))
    return [name for name in came if name in found]


def purged(plan: str) -> list[str]:
    return re.findall(r"(?m)^(?:Purg|Remv) (\S+)", plan)
