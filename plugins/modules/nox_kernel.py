#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Kernel settings that a host may have, now and at every start; the others are named."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nox_kernel
short_description: Sets kernel settings as far as a host allows
description:
  - Writes F(/etc/sysctl.d/60-nox.conf) and sets the running kernel. What was set before is remembered, once.
  - A setting that the kernel doesn't have, or that is read-only and has another value (in a container), is left out and returned with the reason.
  - A value that is larger than the wanted one stays where O(settings) says C(at_least).
author: The Nox maintainers
options:
  settings:
    description: C(name), C(value) as text, C(why), and C(at_least) where more is stricter. Without any, everything is undone.
    type: list
    elements: dict
    required: true
  header:
    description: First line of the file.
    type: str
    required: true
"""

EXAMPLES = r"""
- name: Hide kernel addresses
  nox.platform.nox_kernel:
    header: "# managed by Ansible"
    settings: [{name: kernel.kptr_restrict, value: "2", why: Addresses help an attack on the kernel, at_least: true}]
"""

RETURN = r"""
refused:
  description: Setting to the reason why this host can't have it.
  returned: always
  type: dict
set:
  description: Settings whose value was changed (in check mode, would be), as C(name = value).
  returned: always
  type: list
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nox.platform.plugins.module_utils import brought, host_files, kernel_settings


def stricter(now: str, setting: dict[str, Any]) -> bool:
    """Whether the host has more than is wanted."""
    return bool(setting.get("at_least")) and now.isdigit() and int(now) > int(setting["value"])


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "settings": {"type": "list", "elements": "dict", "required": True},
            "header": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    settings, path = module.params["settings"], kernel_settings.FILE
    impossible = {one["name"]: why for one in settings if (why := kernel_settings.refused(one["name"]))}
    known: dict[str, Any] = brought.read().get(kernel_settings.RECORD, {})
    wanted: dict[str, str] = {}
    lines = [module.params["header"]]
    for one in settings:
        name = one["name"]
        now = kernel_settings.value(name) or ""
        if name in impossible:
            if now == str(one["value"]) or stricter(now, one):
                del impossible[name]  # whoever has the kernel has set it
            continue
        # The operator's own stricter value, which is not one that we set.
        kept = stricter(now, one) and name not in known
        wanted[name] = now if kept else str(one["value"])
        lines += [f"# {one['why']}", f"{name} = {wanted[name]}"]
    text = "\n".join(lines) + "\n" if wanted else ""
    to_set = {name: to for name, to in wanted.items() if kernel_settings.value(name) != to}
    gone = [name for name in known if name not in wanted]
    rewrite = not host_files.in_place(path, text, 0o644) if wanted else path in host_files.recorded()
    done = [f"{name} = {to}" for name, to in to_set.items()]
    done += [f"{name} = {known[name]['was']}" for name in gone]
    before = host_files.read(path) or ""
    if not module.check_mode:
        kernel_settings.take_back(gone)
        known = brought.read().get(kernel_settings.RECORD, {})
        for name, to in wanted.items():
            was = kernel_settings.value(name) or ""
            known[name] = {"was": known.get(name, {}).get("was", was), "set": to}
            if name in to_set:
                kernel_settings.set_value(name, to)
        brought.replace(kernel_settings.RECORD, known)
        if rewrite and wanted:
            host_files.put(path, text, 0o644)
        elif rewrite:
            host_files.take_back(path)
    module.exit_json(
        changed=bool(to_set or gone or rewrite),
        refused=impossible,
        set=done,
        diff=[
            {"before_header": path, "after_header": path, "before": before, "after": text if rewrite else before},
            {"before": "", "after": "".join(f"{one}\n" for one in done)},
        ],
    )


if __name__ == "__main__":
    main()
