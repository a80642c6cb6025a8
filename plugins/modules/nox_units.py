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
    type: str
    choices: [started, restarted, reloaded, stopped]
    default: started
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
sent:
  description: As M(nox.platform.nox_state) returns it.
  returned: always
  type: bool
"""

from ansible_collections.nox.platform.plugins.module_utils import units
from ansible_collections.nox.platform.plugins.module_utils.answers import run_module

ARGUMENTS = {
    "argument_spec": {
        "name": {"type": "list", "elements": "str", "required": True},
        "state": {"type": "str", "choices": ["started", "restarted", "reloaded", "stopped"], "default": "started"},
        "journal_lines": {"type": "int", "default": 30},
    }
}

if __name__ == "__main__":
    run_module(ARGUMENTS, units.answer)
