"""Where things are on the control side."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the checkout, or the installed collection
PLAYBOOKS = ROOT / "playbooks"


def state() -> Path:
    """The journal, the locks and what runs leave; the user's alone. Made on first use.

    NOX_STATE_DIR, else $XDG_STATE_HOME/nox, else ~/.local/state/nox.
    """
    home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local/state")
    path = Path(os.environ.get("NOX_STATE_DIR") or f"{home}/nox")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path
