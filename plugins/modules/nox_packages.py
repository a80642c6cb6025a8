#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Distribution packages that must be there, with a check mode that works on a bare host."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nox_packages
short_description: Installs missing Debian or Ubuntu packages
description:
  - O(state=absent) purges those that came with Nox and that nothing else needs, with what they brought along; others stay.
  - What was installed, dependencies included, is remembered for uninstall.
  - Asks dpkg what is missing and installs just that, in one apt transaction.
  - O(apart=true) leaves apt at work in the background. The next task of this module waits for its end and tells what came of
    it, so nothing is lost where the playbook is stopped in between.
  - Unlike M(ansible.builtin.apt) it needs no python3-apt on the host, so check mode tells the truth on an untouched
    minimal server too; there apt itself is asked what it would install.
author: The Nox maintainers
options:
  name:
    description: The packages.
    type: list
    elements: str
    required: true
  state:
    description: Whether they are to be there.
    type: str
    choices: [present, absent]
    default: present
  recommends:
    description: Whether recommended packages come along.
    type: bool
    default: false
  apart:
    description: Whether to leave as soon as apt is at work. Not in check mode.
    type: bool
    default: false
  lock_timeout:
    description: Seconds to wait for another apt or dpkg to end (unattended-upgrades on a fresh server).
    type: int
    default: 300
"""

EXAMPLES = r"""
- name: Install what the services need
  nox.platform.nox_packages:
    name: [bubblewrap, ufw]

- name: Begin to install what the services need
  nox.platform.nox_packages:
    name: [bubblewrap, ufw]
    apart: true
  register: begun

- name: Wait until they are there
  nox.platform.nox_packages:
    name: [bubblewrap, ufw]
  when: begun.apart
"""

RETURN = r"""
apart:
  description: Whether apt was left at work.
  returned: when state is present
  type: bool
present:
  description: The named packages, which are there now (in check mode, would be; apart, will be).
  returned: when state is present
  type: list
missing:
  description: The named packages that were not there before.
  returned: always
  type: list
removed:
  description: Packages that were (in check mode would be) removed.
  returned: when state is absent
  type: list
stays:
  description: Named packages that are still there.
  returned: when state is absent
  type: list
installed:
  description: Every package that apt installed (in check mode would install), dependencies included.
  returned: when something was missing
  type: list
"""

import fcntl
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nox.platform.plugins.module_utils.brought import read, remember, replace
from ansible_collections.nox.platform.plugins.module_utils.brought_packages import removable

# Locked by whoever is at work, and what a run that was left in the background says at its end.
ANSWER = Path("/run/nox-packages.json")
LONGEST = 3600  # seconds that one is waited for

ENVIRONMENT = {
    "DEBIAN_FRONTEND": "noninteractive",
    "LC_ALL": "C",
    "NEEDRESTART_MODE": "l",
    "TMPDIR": "/tmp",  # noqa: S108  repair's own is /run, where packages may not execute their questions
}


def installed_packages(module: AnsibleModule) -> set[str]:
    _, out, _ = module.run_command(["dpkg-query", "--show", "--showformat", "${Package} ${db:Status-Status}\n"])
    return {line.split()[0] for line in out.splitlines() if line.endswith(" installed")}


def missing_packages(module: AnsibleModule, names: list[str]) -> list[str]:
    _, out, _ = module.run_command(["dpkg-query", "--show", "--showformat", "${Package} ${db:Status-Status}\n", *names])
    present = {line.split()[0] for line in out.splitlines() if line.endswith(" installed")}
    return [name for name in names if name not in present]


def apt(module: AnsibleModule, *arguments: str) -> tuple[int, str, str]:
    result: tuple[int, str, str] = module.run_command(["apt-get", "-q", "-y", *arguments], environ_update=ENVIRONMENT)
    return result


def install(module: AnsibleModule, names: list[str], simulate: bool) -> tuple[int, str, str]:
    options = [
        "-o",
        f"DPkg::Lock::Timeout={module.params['lock_timeout']}",
        # an operator's own changes to configuration files are never overwritten, nor asked about
        "-o",
        "Dpkg::Options::=--force-confdef",
        "-o",
        "Dpkg::Options::=--force-confold",
        "--no-remove",
    ]
    if not module.params["recommends"]:
        options.append("--no-install-recommends")
    if simulate:
        options.append("--simulate")
    return apt(module, *options, "install", *names)


def await_other(module: AnsibleModule) -> dict[str, Any]:
    """Takes the lock, which ends with the process, and returns what one in the background said; empty where there was none."""
    descriptor = os.open(ANSWER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    for _ in range(LONGEST * 10):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.1)
    else:
        module.fail_json(msg=f"apt has been at work for {LONGEST} s, begun by an earlier task. Look: ps -ef | grep apt")
    answer = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    os.truncate(descriptor, 0)
    try:
        found: dict[str, Any] = json.loads(answer)
    except ValueError:  # nothing, or half of it: it was killed
        return {}
    if found.get("failed"):
        module.fail_json(**found)
    return found


def go_on_apart() -> bool:
    """True in the process that Ansible waits for; the other one holds the lock and prints its result into the file."""
    if os.fork():
        return True
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 2):
        os.dup2(nothing, standard)
    os.dup2(os.open(ANSWER, os.O_WRONLY | os.O_CLOEXEC), 1)
    return False


def remove(module: AnsibleModule) -> None:
    def ask(*command: str) -> str:
        _, out, _ = module.run_command(list(command), environ_update=ENVIRONMENT)
        return str(out)

    came, there = read().get("packages", []), installed_packages(module)
    going, needed = removable(ask, came, module.params["name"])
    if going and not module.check_mode:
        rc, out, err = apt(module, "-o", f"DPkg::Lock::Timeout={module.params['lock_timeout']}", "purge", *going)
        if rc != 0:
            module.fail_json(msg=f"apt can't remove {' '.join(going)}: {(err or out).strip()[-1500:]}")
        replace("packages", [name for name in came if name not in going])
    for name in needed:
        module.warn(f"{name} stays: something else needs it")
    module.exit_json(
        changed=bool(going),
        removed=going,
        stays=[name for name in module.params["name"] if name in there and name not in going],
        missing=[],
        diff={"before": "".join(f"{name}\n" for name in going), "after": ""},
    )


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "list", "elements": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "recommends": {"type": "bool", "default": False},
            "apart": {"type": "bool", "default": False},
            "lock_timeout": {"type": "int", "default": 300},
        },
        supports_check_mode=True,
    )
    if module.params["state"] == "absent":
        remove(module)
    answer = {"changed": False, "missing": [], "present": module.params["name"], "apart": False}
    if not module.check_mode:
        answer |= await_other(module) | {"present": module.params["name"]}
    missing = missing_packages(module, module.params["name"])
    if not missing:
        module.exit_json(**answer)
    if not module.params["apart"] or module.check_mode:
        make_present(module, missing)
    if go_on_apart():
        module.exit_json(**{**answer, "apart": True})
    try:
        make_present(module, missing)
    finally:
        sys.stdout.flush()
        os._exit(0)  # nothing of what Ansible's wrapper does at the end: its files are gone


def make_present(module: AnsibleModule, missing: list[str]) -> None:
    """Installs them, and answers."""
    rc, out, err = install(module, missing, simulate=True)
    if rc != 0 and not module.check_mode:
        # empty or stale package lists: the usual state of a fresh image
        update_rc, _, update_err = apt(module, "update")
        rc, out, err = install(module, missing, simulate=True)
        if update_rc != 0:
            err = f"{update_err}\n{err}"
    if rc != 0 and module.check_mode:
        # apt can't plan without package lists, and fetching them would be a change
        plan: list[str] = missing
        module.warn(f"apt can't plan yet (package lists missing?); at least: {' '.join(missing)}")
    elif rc != 0:
        fail(module, missing, err)
    else:
        plan = sorted(re.findall(r"^Inst (\S+)", out, re.MULTILINE))

    result: dict[str, Any] = {
        "changed": True,
        "apart": False,
        "present": module.params["name"],
        "missing": missing,
        "installed": plan,
        "diff": {"before": "", "after": "".join(f"{name}\n" for name in plan)},
    }
    if module.check_mode:
        module.exit_json(**result)

    before = installed_packages(module)
    rc, _, err = install(module, missing, simulate=False)
    if rc != 0:
        # lists that point at files the mirror no longer has
        apt(module, "update")
        rc, _, err = install(module, missing, simulate=False)
    if rc != 0 or missing_packages(module, missing):
        fail(module, missing, err)
    remember("packages", sorted(installed_packages(module) - before))
    module.exit_json(**result)


def fail(module: AnsibleModule, missing: list[str], err: str) -> None:
    module.fail_json(
        msg=f"apt can't install {' '.join(missing)}: {err.strip()[-1500:]}\n"
        f"See for yourself: sudo apt-get update && sudo apt-get install {' '.join(missing)}"
    )


if __name__ == "__main__":
    os.umask(0o022)  # packages' files must not inherit a hardened umask
    main()
