#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""What a host must show before its release counts as healthy."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nox_gate
short_description: Watches a host's services, tries them as a client would, and records the release as healthy
description:
  - Runs the smoke tests that role nox_tools has left on the host, C(/usr/local/share/nox/tests/smoke.sh), in the last two
    seconds of the watch. Fails as soon as a service ends or a test has failed, with the journal's last lines or the tests' reasons.
  - All in one round trip, which a host with a copy of this very code runs without being sent it. In check mode nothing is tested.
author: The Nox maintainers
options:
  url:
    description: Where clients find the host.
    type: str
    required: true
  ca:
    description: A PEM file on the host with the authority that signed its certificate; empty for the system's.
    type: str
    default: ""
  units:
    description: Units that have to stay up, their services with the same process.
    type: list
    elements: str
    default: []
  seconds:
    description: For how long.
    type: float
    default: 0
  release:
    description: The release to record as healthy, C(<version>-<digest>); it must be the one that was switched to last.
    type: str
    default: ""
  root:
    description: The directory that holds releases and links.
    type: path
    default: /opt/nox
  record:
    description: Where M(nox.platform.nox_state) keeps its record.
    type: path
    default: /var/lib/nox/state.json
"""

EXAMPLES = r"""
- name: Try the service as a client would
  nox.platform.nox_gate:
    url: https://nox.example.org
    units: [nox-runner.service, nox-api.service]
    seconds: 5
"""

RETURN = r"""
report:
  description: What the smoke tests printed.
  returned: success
  type: list
sent:
  description: As M(nox.platform.nox_state) returns it.
  returned: always
  type: bool
"""

from ansible_collections.nox.platform.plugins.module_utils import host_gate
from ansible_collections.nox.platform.plugins.module_utils.answers import run_module

ARGUMENTS = {
    "argument_spec": {
        "url": {"type": "str", "required": True},
        "ca": {"type": "str", "default": ""},
        "units": {"type": "list", "elements": "str", "default": []},
        "seconds": {"type": "float", "default": 0},
        "release": {"type": "str", "default": ""},
        "root": {"type": "path", "default": "/opt/nox"},
        "record": {"type": "path", "default": "/var/lib/nox/state.json"},
    }
}

if __name__ == "__main__":
    run_module(ARGUMENTS, host_gate.answer)
