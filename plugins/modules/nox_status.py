#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""What a fleet's table shows of one host: release, health, certificate, counters."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nox_status
short_description: Says which release of Nox a host runs, and how it is
description:
  - Reads what is on the host, asks the running service, and compares the host with its record as M(nox.platform.nox_state)
    does, all in one round trip. Changes nothing.
author: The Nox maintainers
options:
  probe:
    description: How many small programs to run, to see how long they take. They are counted like any client's.
    type: int
    default: 0
"""

EXAMPLES = r"""
- name: Look
  nox.platform.nox_status:
"""

RETURN = r"""
status:
  description: What was found.
  returned: always
  type: dict
  sample:
    installed: true
    version: 0.1.0
    release: 0.1.0-3f9d2c1ab04e
    release_since: "2026-01-02T03:04:05Z"
    last_healthy: 0.1.0-3f9d2c1ab04e
    proven: true
    healthy: true
    problem: ""
    restarts: {nox-api.service: 0, nox-runner.service: 0}
    requests: 120
    server_errors: 0
    request_seconds: 1.5
    probe_ms: 31.5
    last_run: "2026-01-02T03:04:05Z"
    token_age_days: 12
    certificate_days: 80
verdict:
  description: As M(nox.platform.nox_state) returns it.
  returned: always
  type: str
findings:
  description: As M(nox.platform.nox_state) returns them.
  returned: always
  type: list
about:
  description: As M(nox.platform.nox_state) returns it, as is all else but C(host).
  returned: always
  type: dict
sent:
  description: As M(nox.platform.nox_state) returns it.
  returned: always
  type: bool
"""

from ansible_collections.nox.platform.plugins.module_utils import host_status
from ansible_collections.nox.platform.plugins.module_utils.answers import run_module

ARGUMENTS = {"argument_spec": {"probe": {"type": "int", "default": 0}}}

if __name__ == "__main__":
    run_module(ARGUMENTS, host_status.answer)
