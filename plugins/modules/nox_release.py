#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Releases on a host: checked, unpacked beside each other, switched by one rename, remembered."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nox_release
short_description: Unpacks a release and makes it the current one
description:
  - Unpacks an archive made by M(nox.platform.nox_release_build) to C(releases/<id>), after its SHA-256 has been
    checked, and lets C(current) point to it by one atomic rename. No network, no pip, no compiler.
  - A release that is there already is checked file by file against its own list, and unpacked anew when it differs.
  - C(manifest.json) remembers which release ran from when, and whether it was seen healthy or failed. Pruning and
    rolling back go by that record, never by file times; the current and the last healthy release are spared.
author: The Nox maintainers
options:
  id:
    description:
      - The release, C(<version>-<digest>). With O(state=back) it may be left out, which means the last other release
        that was recorded as healthy and is still there.
    type: str
    default: ""
  sha256:
    description: The archive's SHA-256. Needed with O(state=current).
    type: str
  archive:
    description: The archive on the host. Needed with O(state=current).
    type: path
  root:
    description: The directory that holds releases, archives and links.
    type: path
    default: /opt/nox
  keep:
    description: How many releases stay, the current one included.
    type: int
    default: 3
  record:
    description: Where M(nox.platform.nox_state) keeps its record; a lost manifest is made again from it.
    type: path
    default: /var/lib/nox/state.json
  state:
    description:
      - V(current) unpacks, tries whether the new code can be loaded at all, and switches. V(healthy) and V(failed)
        record what came of the tests of the release that was switched to last. V(back) switches to a release recorded
        as healthy.
    type: str
    choices: [current, healthy, failed, back]
    default: current
"""

EXAMPLES = r"""
- name: Run this release
  nox.platform.nox_release:
    id: 0.1.0-3f9d2c1ab04e
    sha256: 3f9d2c1ab04e...
    archive: /opt/nox/archives/0.1.0-3f9d2c1ab04e.tar.gz
"""

RETURN = r"""
release:
  description: The release that is current now (in check mode, would be).
  returned: always
  type: str
previous:
  description: The release that was current before, empty where there was none.
  returned: always
  type: str
proven:
  description: Whether it was recorded as healthy since it was switched to; if not, what runs may still be the one before.
  returned: always
  type: bool
actions:
  description: What was done (in check mode, would be done), in order.
  returned: always
  type: list
sent:
  description: As M(nox.platform.nox_state) returns it.
  returned: always
  type: bool
"""

from ansible_collections.nox.platform.plugins.module_utils import releases
from ansible_collections.nox.platform.plugins.module_utils.answers import run_module

ARGUMENTS = {
    "argument_spec": {
        "id": {"type": "str", "default": ""},
        "sha256": {"type": "str"},
        "archive": {"type": "path"},
        "root": {"type": "path", "default": "/opt/nox"},
        "keep": {"type": "int", "default": 3},
        "record": {"type": "path", "default": "/var/lib/nox/state.json"},
        "state": {"type": "str", "choices": ["current", "healthy", "failed", "back"], "default": "current"},
    },
    "required_if": [
        ("state", "current", ["id", "sha256", "archive"]),
        ("state", "healthy", ["id"]),
        ("state", "failed", ["id"]),
    ],
}

if __name__ == "__main__":
    run_module(ARGUMENTS, releases.answer)
