#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Several systemd units at once: enabled, started or restarted, with the journal when one won't."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nox_units
short_description: Enables and starts systemd units together
description:
  - Asks systemd once about all units and acts only where one differs. Masked units are unmasked, failed ones
    (start-limit-hit included) are reset first, and units changed on disk are reloaded.
  - Check mode is exact on a host that doesn't have the units yet, where M(ansible.builtin.systemd_service) fails.
  - A unit that doesn't come up fails the task with the last lines of its journal.
author: The Nox maintainers
options:
  name:
    description: Units with their suffix, in the order in which they are to be started.
    type: list
    elements: str
    required: true
  state:
    description:
      - V(started) starts what is not active. V(restarted) always acts, V(reloaded) acts on what is active (for handlers).
      - V(stopped) also disables.
      - V(stable) changes nothing; it fails unless all units stay up for O(seconds), their services with the same process.
    type: str
    choices: [started, restarted, reloaded, stopped, stable]
    default: started
  seconds:
    description: How long units have to stay up with O(state=stable).
    type: int
    default: 5
  journal_lines:
    description: How many journal lines a failure shows.
    type: int
    default: 30
"""

EXAMPLES = r"""
- name: Run the services
  nox.platform.nox_units:
    name: [nox-runner.socket, nox-runner.service, nox-api.service]
"""

RETURN = r"""
units:
  description: Unit → its state before.
  returned: always
  type: dict
actions:
  description: What was done (in check mode, would be done), in order.
  returned: always
  type: list
"""

import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule

PROPERTIES = ("Id", "LoadState", "ActiveState", "SubState", "UnitFileState", "NeedDaemonReload", "MainPID")


def show(module: AnsibleModule, names: list[str]) -> dict[str, dict[str, str]]:
    """Unit → properties, for all units in one call. Blocks come in the order asked."""
    rc, out, err = module.run_command(["systemctl", "show", f"--property={','.join(PROPERTIES)}", *names])
    if rc != 0:
        module.fail_json(msg=f"systemd doesn't answer: {err.strip()}")
    blocks = [block for block in out.strip().split("\n\n") if block]
    return {
        name: dict(line.split("=", 1) for line in block.splitlines())
        for name, block in zip(names, blocks)  # noqa: B905  Python 3.9's zip has no strict=
    }


def watch(module: AnsibleModule, names: list[str], seconds: int) -> None:
    """Fails as soon as a unit isn't up, or a service has another process than at first."""
    first = show(module, names)
    end = time.monotonic() + seconds
    now = first
    while True:
        for name in names:
            if now[name]["ActiveState"] not in ("active", "reloading"):
                fail(module, [name], f"{name} is {now[name]['ActiveState']} ({now[name]['SubState']})")
            if now[name].get("MainPID") != first[name].get("MainPID"):
                fail(module, [name], f"{name} was restarted within {seconds} s")
        if time.monotonic() >= end:
            return
        time.sleep(0.5)
        now = show(module, names)


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


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "list", "elements": "str", "required": True},
            "state": {
                "type": "str",
                "choices": ["started", "restarted", "reloaded", "stopped", "stable"],
                "default": "started",
            },
            "seconds": {"type": "int", "default": 5},
            "journal_lines": {"type": "int", "default": 30},
        },
        supports_check_mode=True,
    )
    names, state = module.params["name"], module.params["state"]
    if state == "stable":
        if not module.check_mode:
            watch(module, names, module.params["seconds"])
        module.exit_json(changed=False, units={}, actions=[])
    units = show(module, names)
    actions = plan(units, state)
    lines = [f"systemctl {' '.join(action)}" for action in actions]
    if not module.check_mode:
        for action in actions:
            rc, _, err = module.run_command(["systemctl", *action])
            if rc != 0:
                fail(module, names, f"systemctl {' '.join(action)}: {err.strip()}")
        if actions and state != "stopped":
            after = show(module, names)
            wanted = names if state != "reloaded" else [n for n in names if units[n]["ActiveState"] == "active"]
            down = [n for n in wanted if after[n]["ActiveState"] != "active"]
            if down:
                fail(module, down, f"{' '.join(down)} did not come up")
    result: dict[str, Any] = {
        "changed": bool(actions),
        "units": units,
        "actions": lines,
        "diff": {"before": "", "after": "".join(f"{line}\n" for line in lines)},
    }
    module.exit_json(**result)


def fail(module: AnsibleModule, names: list[str], what: str) -> None:
    count = str(module.params["journal_lines"])
    wanted = [argument for name in names for argument in ("-u", name)]
    _, journal, _ = module.run_command(["journalctl", "--no-pager", "-q", "-n", count, "-o", "short", *wanted])
    module.fail_json(
        msg=f"{what}\nThe journal's last lines:\n{journal.rstrip() or '(nothing)'}\n"
        f"More: sudo journalctl -u {names[0]} -n 100 --no-pager"
    )


if __name__ == "__main__":
    main()
