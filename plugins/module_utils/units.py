# SPDX-License-Identifier: Apache-2.0
"""systemd's units: enabled, started, restarted, and what they said when that fails. What nox_units does."""

from __future__ import annotations

from typing import Any

from .commands import run

PROPERTIES = (
    "Id,LoadState,ActiveState,SubState,UnitFileState,NeedDaemonReload,MainPID,NRestarts,InactiveEnterTimestampMonotonic"
)


class Failed(Exception):
    """A unit isn't as wanted; the message says why, and what its journal says."""


def last_words(names: list[str], lines: int = 30) -> str:
    """The journal's last lines of these units, and how to see more."""
    wanted = [argument for name in names for argument in ("-u", name)]
    told = run("journalctl", "--no-pager", "-q", "-n", str(lines), "-o", "short", *wanted).stdout
    return (
        f"The journal's last lines:\n{told.rstrip() or '(nothing)'}\n"
        f"More: sudo journalctl {' '.join(wanted)} -n 100 --no-pager"
    )


def show(names: list[str]) -> dict[str, dict[str, str]]:
    """Unit → its properties, for all in one call; empty where systemd doesn't answer."""
    ran = run("systemctl", "show", f"--property={PROPERTIES}", *names)
    blocks = [block for block in ran.stdout.strip().split("\n\n") if block]
    shown = [dict(line.split("=", 1) for line in block.splitlines()) for block in blocks]
    return dict(zip(names, shown))  # noqa: B905  Python 3.9's zip has no strict=


def plan(units: dict[str, dict[str, str]], state: str) -> list[list[str]]:
    """The systemctl calls that lead there."""
    actions: list[list[str]] = []
    names = list(units)
    if state == "stopped":
        there = [n for n in names if units[n]["LoadState"] not in ("not-found", "masked")]
        wrong = [
            n
            for n in there
            if units[n]["ActiveState"] not in ("inactive", "failed") or units[n]["UnitFileState"] == "enabled"
        ]
        return [["disable", "--now", *wrong]] if wrong else []
    masked = [n for n in names if units[n]["LoadState"] == "masked"]
    if masked:
        actions.append(["unmask", *masked])
    disabled = [n for n in names if units[n]["UnitFileState"] not in ("enabled", "static", "alias")]
    # anything but "loaded": systemd tried at a moment when the file was missing or damaged, and remembers that
    if disabled:
        actions.append(["enable", *disabled])  # with a daemon-reload of its own
    elif masked or any(u["LoadState"] != "loaded" or u["NeedDaemonReload"] == "yes" for u in units.values()):
        actions.append(["daemon-reload"])
    failed = [n for n in names if units[n]["ActiveState"] == "failed"]
    if failed:
        actions.append(["reset-failed", *failed])
    if state == "started":
        down = [n for n in names if units[n]["ActiveState"] not in ("active", "reloading", "activating")]
        actions += [["start", *down]] if down else []
    elif state == "restarted":
        actions.append(["restart", *names])
    else:
        up = [n for n in names if units[n]["ActiveState"] == "active"]
        actions += [["reload-or-restart", *up]] if up else []
    return actions


def change(names: list[str], state: str, lines: int, dry: bool) -> dict[str, Any]:
    """What nox_units returns when it doesn't fail. Raises Failed."""
    units = show(names)
    if len(units) < len(names):
        raise Failed(f"systemd says nothing of {', '.join(name for name in names if name not in units)}")
    actions = plan(units, state)

    def told(which: list[str], what: str) -> Failed:
        return Failed(f"{what}\n{last_words(which, lines)}")

    if not dry:
        for action in actions:
            ran = run("systemctl", *action, seconds=None)
            if ran.returncode != 0:
                raise told(names, f"systemctl {' '.join(action)}: {ran.stderr.strip()}")
        if actions and state != "stopped":
            after = show(names)
            wanted = names if state != "reloaded" else [n for n in names if units[n]["ActiveState"] == "active"]
            down = [n for n in wanted if after.get(n, {}).get("ActiveState") != "active"]
            if down:
                raise told(down, f"{' '.join(down)} did not come up")
    done = [f"systemctl {' '.join(action)}" for action in actions]
    diff = {"before": "", "after": "".join(f"{line}\n" for line in done)}
    return {"changed": bool(actions), "units": units, "actions": done, "diff": diff}


def answer(options: dict[str, Any]) -> dict[str, Any]:
    """What nox_units returns; `options` are its own, checked, and check_mode."""
    try:
        return change(options["name"], options["state"], options["journal_lines"], options["check_mode"])
    except Failed as why:
        return {"failed": True, "msg": str(why)}
