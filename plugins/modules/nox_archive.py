#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""A release's archive on a host: brought piece by piece, once."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nox_archive
short_description: Brings a release's archive to a host, once, and goes on where it was cut off
description:
  - Copies one file made by M(nox.platform.nox_release_build) to C(archives/) below O(root), and makes the directories
    for archives and releases. A file that lies there with the right digest is not copied.
  - It goes over in pieces of 8 MiB. Where a connection ends in the middle, the pieces that arrived are kept, and the
    next run goes on after them. The file has its own name only when all of it is there and its SHA-256 is the one given.
author: The Nox maintainers
attributes:
  check_mode:
    support: full
options:
  src:
    description: The archive on the control side.
    type: path
    required: true
  id:
    description: The release, C(<version>-<digest>).
    type: str
    required: true
  sha256:
    description: The archive's SHA-256.
    type: str
    required: true
  root:
    description: The directory that holds releases, archives and links.
    type: path
    default: /opt/nox
  piece:
    description: A piece that lies on the host already. The action plugin sets it, nobody else.
    type: path
  offset:
    description: Where that piece begins.
    type: int
    default: 0
"""

EXAMPLES = r"""
- name: Ship the archive
  nox.platform.nox_archive:
    src: ~/.cache/nox/releases/0.1.0-3f9d2c1ab04e.tar.gz
    id: 0.1.0-3f9d2c1ab04e
    sha256: 3f9d2c1ab04e...
"""

RETURN = r"""
have:
  description: How many bytes of the archive are on the host.
  returned: always
  type: int
complete:
  description: Whether that is all of it.
  returned: always
  type: bool
pieces:
  description: How many pieces were sent.
  returned: when the archive was not there
  type: int
sent:
  description: As M(nox.platform.nox_state) returns it.
  returned: always
  type: bool
"""

from ansible_collections.nox.platform.plugins.module_utils import archives
from ansible_collections.nox.platform.plugins.module_utils.answers import run_module

ARGUMENTS = {
    "argument_spec": {
        "src": {"type": "path", "required": True},
        "id": {"type": "str", "required": True},
        "sha256": {"type": "str", "required": True},
        "root": {"type": "path", "default": "/opt/nox"},
        "piece": {"type": "path"},
        "offset": {"type": "int", "default": 0},
    }
}

if __name__ == "__main__":
    run_module(ARGUMENTS, archives.answer)
