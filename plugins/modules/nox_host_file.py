#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""A file of the host's own configuration, or one line of it, with the way back."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nox_host_file
short_description: Writes a file of the host's own configuration, remembering what was there
description:
  - Root's. Missing directories are made. What was there before is remembered once, for O(state=absent) and for uninstall.
  - O(state=absent) makes the file what it was. One that somebody changed in the meantime stays; RV(stays) says so.
author: The Nox maintainers
options:
  path:
    description: The file.
    type: path
    required: true
  content:
    description: The whole of it; or O(line).
    type: str
  line:
    description: One line of somebody else's file. It replaces the last one that O(pattern) matches, or is added.
    type: str
  pattern:
    description: Regular expression for the beginning of the line that O(line) replaces.
    type: str
  mode:
    description: Of a whole file.
    type: str
    default: "0644"
  state:
    description: Whether it is to be there.
    type: str
    choices: [present, absent]
    default: present
"""

EXAMPLES = r"""
- name: Let nobody keep core files
  nox.platform.nox_host_file:
    path: /etc/security/limits.d/nox.conf
    content: "* hard core 0\n"
"""

RETURN = r"""
stays:
  description: With O(state=absent), why the file stays as it is.
  returned: always
  type: str
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nox.platform.plugins.module_utils import host_files


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "content": {"type": "str"},
            "line": {"type": "str"},
            "pattern": {"type": "str"},
            "mode": {"type": "str", "default": "0644"},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        mutually_exclusive=[("content", "line")],
        required_together=[("line", "pattern")],
        required_if=[("state", "present", ("content", "line"), True)],
        supports_check_mode=True,
    )
    wanted = module.params
    path, mode, stays = wanted["path"], int(wanted["mode"], 8), ""
    before = host_files.read(path) or ""
    if wanted["state"] == "absent":
        entry = host_files.recorded().get(path)
        changed = entry is not None
        after = ((entry or {}).get("was") or "") if "line" not in (entry or {}) else before
        if not module.check_mode:
            stays = host_files.take_back(path)
    elif wanted["line"] is not None:
        after, _ = host_files.with_line(before, wanted["pattern"], wanted["line"])
        changed = after != before
        if changed and not module.check_mode:
            host_files.put_line(path, wanted["pattern"], wanted["line"])
    else:
        after = wanted["content"]
        changed = not host_files.in_place(path, after, mode)
        if changed and not module.check_mode:
            host_files.put(path, after, mode)
    if stays:
        module.warn(stays)
    module.exit_json(
        changed=changed,
        stays=stays,
        diff={"before_header": path, "after_header": path, "before": before, "after": after if changed else before},
    )


if __name__ == "__main__":
    main()
