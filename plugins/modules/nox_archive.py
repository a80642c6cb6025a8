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
"""

import os
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nox.platform.plugins.module_utils.digests import digest_of_file


def directory(path: Path, check_mode: bool) -> bool:
    """Root's, readable by all; whether that had to be changed."""
    try:
        found = path.stat()
        right = (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (0, 0, 0o755)
    except FileNotFoundError:
        right = False
    if not right and not check_mode:
        path.mkdir(parents=True, exist_ok=True)
        os.chown(path, 0, 0)
        path.chmod(0o755)
    return not right


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "src": {"type": "path", "required": True},
            "id": {"type": "str", "required": True},
            "sha256": {"type": "str", "required": True},
            "root": {"type": "path", "default": "/opt/nox"},
            "piece": {"type": "path"},
            "offset": {"type": "int", "default": 0},
        },
        supports_check_mode=True,
    )
    root, sha256 = Path(module.params["root"]), module.params["sha256"]
    archive = root / "archives" / f"{module.params['id']}.tar.gz"
    partial = archive.with_name(f".{archive.name}.part")
    places = (root, archive.parent, root / "releases")
    changed = [path for path in places if directory(path, module.check_mode)]
    if archive.is_file() and digest_of_file(archive) == sha256:
        found = archive.stat()
        if (found.st_uid, found.st_gid, found.st_mode & 0o7777) != (0, 0, 0o644):
            changed.append(archive)
            if not module.check_mode:
                os.chown(archive, 0, 0)
                archive.chmod(0o644)
        module.exit_json(changed=bool(changed), complete=True, have=found.st_size)
    have = partial.stat().st_size if partial.exists() else 0
    if module.params["piece"]:
        # a piece that was written halfway when the host lost power begins anew
        with open(partial, "r+b" if have else "wb") as handle:  # noqa: PTH123  a mode, not a way
            handle.truncate(module.params["offset"])
            handle.seek(module.params["offset"])
            handle.write(Path(module.params["piece"]).read_bytes())
            handle.flush()
            os.fsync(handle.fileno())
        have = partial.stat().st_size
    complete = bool(have) and digest_of_file(partial) == sha256
    if complete and not module.check_mode:
        partial.chmod(0o644)
        partial.replace(archive)
        for other in archive.parent.glob(".*.part"):  # of releases that were given up
            other.unlink()
    module.exit_json(changed=True, complete=complete, have=have)


if __name__ == "__main__":
    main()
