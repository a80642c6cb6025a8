#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""One check of a whole host: what Nox's roles made, against what they recorded when they last made it true."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nox_state
short_description: Compares a host with what Nox's roles recorded, in one round trip
description:
  - Compares files, directories, links, accounts, packages, the release, units, sockets, the firewall's rules as the
    kernel has them, and the proxy's configuration as it is loaded, with a record the install made when all was well.
  - Needs nothing of Nox to work. A host without any trace of it is V(absent).
  - O(state=checked) changes nothing. The token is never returned, nor any digest of the settings file.
author: The Nox maintainers
options:
  state:
    description:
      - V(checked) compares. V(cleared) gives paths their recorded owner and mode, which takes no role, and moves what
        stands in the roles' way to a directory of its own, where nothing is lost. V(recorded) remembers the host as it
        is and compares what is alive.
    type: str
    choices: [checked, cleared, recorded]
    default: checked
  record:
    description: Where the record is kept, mode 0600.
    type: path
    default: /var/lib/nox/state.json
  aside:
    description: Under this directory O(state=cleared) keeps what it moves.
    type: path
    default: /var/lib/nox/aside
  about:
    description:
      - What only the playbook knows, for O(state=recorded). C(proxy) (caddy, nginx or none), C(url) and C(ca) for the
        smoke tests, C(firewall) (TCP ports open to everybody; empty when UFW isn't ours), C(patterns) (setting to
        regular expression). Keys that are left out stay as recorded before.
    type: dict
    default: {}
  role:
    description: With O(state=recorded), only this role's part of the record is renewed; what else differs stays a difference.
    type: str
    default: ""
  paths:
    description: Paths whose free space is wanted, in C(host.free_mib).
    type: list
    elements: path
    default: []
"""

EXAMPLES = r"""
- name: Compare the host with its record
  nox.platform.nox_state:
  register: nox_state_found
"""

RETURN = r"""
verdict:
  description: One of clean, drifted, absent.
  returned: always
  type: str
findings:
  description: What differs, in the order of the roles. The owner C(operator) means that no role may change it.
  returned: always
  type: list
  sample:
    - id: unit.masked
      owner: nox_service
      what: nox-api.service
      expected: enabled
      found: masked
      severity: fail
      since: "2026-01-31T12:00:00Z"
owners:
  description:
    - The roles that mend the findings, in the order of an install. A role isn't among them whose units are merely down, or
      whose paths only lost their owner or mode.
  returned: always
  type: list
down:
  description: Units that only have to be enabled and started; nothing else of their role differs.
  returned: always
  type: list
set_right:
  description: Paths that O(state=cleared) gives back their owner and mode.
  returned: always
  type: list
stale:
  description: Nox's units, all of them, if one is up but runs something older than what is on disk, or lost its socket.
  returned: always
  type: list
stale_proxy:
  description: The proxy's unit, if it runs another configuration than the one on disk.
  returned: always
  type: list
release:
  description:
    - Where the release has to be mended, the one to keep, C(id) and C(sha256) of its archive on the host, the latter empty if that
      is lost or damaged. Empty where another one is needed, or none is known.
  returned: always
  type: dict
in_the_way:
  description: Whether O(state=cleared) has something to do before the roles run.
  returned: always
  type: bool
about:
  description: What was recorded of the playbook's own knowledge.
  returned: always
  type: dict
ids:
  description: Account to its recorded C(uid) and C(gid), for accounts that have to be made again.
  returned: always
  type: dict
aside:
  description: What was moved, and where to.
  returned: when state is cleared
  type: list
sent:
  description: Whether the check was sent to the host. It isn't where role nox_tools has left the very same one.
  returned: always
  type: bool
seconds:
  description: How long the check took on the host.
  returned: always
  type: float
host:
  description: What decides which release it can run. The same facts of M(nox.platform.nox_host) have the same names.
  returned: always
  type: dict
  sample: {python: "3.10", arch: x86_64, free_mib: {/opt: 20480}}
"""

from ansible_collections.nox.platform.plugins.module_utils import host_state
from ansible_collections.nox.platform.plugins.module_utils.answers import run_module

ARGUMENTS = {
    "argument_spec": {
        "state": {"type": "str", "choices": ["checked", "cleared", "recorded"], "default": "checked"},
        "record": {"type": "path", "default": host_state.RECORD},
        "aside": {"type": "path", "default": "/var/lib/nox/aside"},
        "about": {"type": "dict", "default": {}},
        "role": {"type": "str", "default": ""},
        "paths": {"type": "list", "elements": "path", "default": []},
    }
}

if __name__ == "__main__":
    run_module(ARGUMENTS, host_state.answer)
