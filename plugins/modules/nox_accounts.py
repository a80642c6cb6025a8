#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""System users, each with a group of its name: one round trip, where the stock modules take two for each."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nox_accounts
short_description: Makes system users and their groups
description:
  - Each user gets a group of the same name, no home directory and no password. One that is there keeps its numbers,
    unless others are given; what else differs is set right.
  - Check mode and diff are exact.
author: The Nox maintainers
options:
  accounts:
    description: The users.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the user and of its group.
        type: str
        required: true
      comment:
        description: What it is for.
        type: str
        required: true
      home:
        description: Its home, which is not made.
        type: path
        required: true
      shell:
        description: Its shell.
        type: path
        default: /usr/sbin/nologin
  ids:
    description:
      - Name to a dictionary with C(uid) and C(gid), where they must be certain numbers, because files on the host have them.
    type: dict
    default: {}
"""

EXAMPLES = r"""
- name: Make the users
  nox.platform.nox_accounts:
    accounts:
      - {name: nox-api, comment: HTTP front, home: /nonexistent}
    ids: {nox-api: {uid: 998, gid: 998}}
"""

RETURN = r"""
actions:
  description: The commands that were run (in check mode, would be).
  returned: always
  type: list
"""

import contextlib
import grp
import pwd
from typing import Any

from ansible.module_utils.basic import AnsibleModule


def group_plan(name: str, gid: int | None) -> list[list[str]]:
    number = [] if gid is None else ["--gid", str(gid)]
    try:
        found = grp.getgrnam(name)
    except KeyError:
        return [["groupadd", "--system", *number, name]]
    return [["groupmod", *number, name]] if gid not in (None, found.gr_gid) else []


def user_plan(one: dict[str, Any], uid: int | None) -> list[list[str]]:
    name = one["name"]
    wanted = {"comment": one["comment"], "home": one["home"], "shell": one["shell"], "gid": name}
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        options = wanted | ({} if uid is None else {"uid": str(uid)})
        made = ["useradd", "--system", "--no-create-home", "--no-user-group", "--password", "!"]
        return [[*made, *(word for key, value in options.items() for word in (f"--{key}", value)), name]]
    has = {"comment": found.pw_gecos, "home": found.pw_dir, "shell": found.pw_shell, "gid": str(found.pw_gid)}
    with contextlib.suppress(KeyError):  # of a group that isn't there the number stays, which differs from any name
        has["gid"] = grp.getgrgid(found.pw_gid).gr_name
    if uid is not None:
        wanted["uid"], has["uid"] = str(uid), str(found.pw_uid)
    differs = [word for key, value in wanted.items() if has[key] != value for word in (f"--{key}", value)]
    return [["usermod", *differs, name]] if differs else []


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "accounts": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "comment": {"type": "str", "required": True},
                    "home": {"type": "path", "required": True},
                    "shell": {"type": "path", "default": "/usr/sbin/nologin"},
                },
            },
            "ids": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    done: list[str] = []
    for one in module.params["accounts"]:
        ids = module.params["ids"].get(one["name"], {})
        number = {key: int(ids[key]) if key in ids else None for key in ("uid", "gid")}
        for command in [*group_plan(one["name"], number["gid"]), *user_plan(one, number["uid"])]:
            done.append(" ".join(command))
            rc, out, err = module.run_command(command) if not module.check_mode else (0, "", "")
            if rc != 0:
                module.fail_json(msg=f"{done[-1]}: {(err or out).strip()}", actions=done[:-1])
    diff = {"before": "", "after": "".join(f"{line}\n" for line in done)}
    module.exit_json(changed=bool(done), actions=done, diff=diff)


if __name__ == "__main__":
    main()
