#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""UFW closed but for a few ports, without a moment in which ssh is shut out."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nox_firewall
short_description: Closes a host with UFW but for ssh and a few ports
description:
  - Adds the missing allow rules first, ssh before all others, then sets the default for incoming to deny, then enables
    UFW. Nothing is reset or deleted; rules that an operator added stay.
  - Reads the result back from the kernel (not from UFW's files) and fails when a rule isn't loaded.
  - Check mode is exact, on a host without UFW too.
author: The Nox maintainers
options:
  ssh_ports:
    description: TCP ports on which ssh is really served.
    type: list
    elements: int
    required: true
  allow:
    description: Further TCP ports to open.
    type: list
    elements: int
    default: []
  never:
    description: TCP ports that must not be open to the outside; an operator's rule that opens one is warned about.
    type: list
    elements: int
    default: []
"""

EXAMPLES = r"""
- name: Close the host
  nox.platform.nox_firewall:
    ssh_ports: [22]
    allow: [80, 443]
    never: [8080]
"""

RETURN = r"""
actions:
  description: What was done (in check mode, would be done), in order.
  returned: always
  type: list
rules:
  description: The rules UFW knew before.
  returned: always
  type: list
"""

import re
import shutil
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nox.platform.plugins.module_utils.brought import remember

DEFAULTS = Path("/etc/default/ufw")
STATE = Path("/etc/ufw/ufw.conf")


def setting(path: Path, key: str) -> str:
    """One value of UFW's own shell-like files, lower case; "" where it isn't there."""
    try:
        match = re.findall(rf'(?m)^\s*{key}="?([A-Za-z]+)"?', path.read_text(encoding="utf-8"))
    except OSError:
        return ""
    return match[-1].lower() if match else ""


def added_rules(module: AnsibleModule) -> list[str]:
    """`ufw show added` lists the operator's view of the rules, active or not."""
    _, out, _ = module.run_command(["ufw", "show", "added"])
    return [line[4:].strip() for line in out.splitlines() if line.startswith("ufw ")]


def opens(rule: str, port: int) -> bool:
    """Whether a rule lets anyone in on this TCP port (limit counts: it lets in, slowly)."""
    match = re.match(r"^(?:allow|limit)(?: in)? (\S+)(?: comment .*)?$", rule)
    return bool(match) and match.group(1) in (str(port), f"{port}/tcp")  # type: ignore[union-attr]


def loaded(module: AnsibleModule, port: int) -> bool:
    """Whether the kernel has the rule, for IPv4."""
    _, out, _ = module.run_command(["iptables", "-S", "ufw-user-input"])
    for line in out.splitlines():
        if re.search(rf"--dports? (?:\S+,)?{port}(?:,\S+)?\b", line) and re.search(r"-j (ACCEPT|ufw-user-limit)", line):
            return True
    return False


def closed_by_default(module: AnsibleModule) -> bool:
    _, out, _ = module.run_command(["iptables", "-S", "INPUT"])
    return "-P INPUT DROP" in out and "ufw-before-input" in out


def drop_flushed_chains(module: AnsibleModule) -> None:
    """After `iptables -F` UFW's chains exist, empty and unused. UFW takes them for loaded ones, fills nothing, and its
    next reload sets the policy to DROP: ssh is shut out. Without the chains it builds all of them.
    """
    for program in ("iptables", "ip6tables"):
        _, out, _ = module.run_command([program, "-S"])
        chains = re.findall(r"(?m)^-N (ufw\S*)", out)
        jump = "ufw-before-input" if program == "iptables" else "ufw6-before-input"
        if not chains or f"-A INPUT -j {jump}" in out:
            continue
        module.run_command([program, "-P", "INPUT", "ACCEPT"])
        for flag in ("-F", "-X"):
            for chain in chains:
                module.run_command([program, flag, chain])


def plan(rules: list[str], ports: list[int], default_input: str, enabled: bool, kernel_ok: bool) -> list[list[str]]:
    """UFW calls in the only safe order: openings, then the default, then the switch."""
    actions: list[list[str]] = [
        ["allow", f"{port}/tcp"] for port in ports if not any(opens(rule, port) for rule in rules)
    ]
    if default_input not in ("drop", "reject"):
        actions.append(["default", "deny", "incoming"])
    if not enabled:
        actions.append(["--force", "enable"])
    elif not kernel_ok and not actions:
        actions.append(["reload"])
    return actions


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "ssh_ports": {"type": "list", "elements": "int", "required": True},
            "allow": {"type": "list", "elements": "int", "default": []},
            "never": {"type": "list", "elements": "int", "default": []},
        },
        supports_check_mode=True,
    )
    ports = [*module.params["ssh_ports"], *module.params["allow"]]
    ports = list(dict.fromkeys(ports))
    there = shutil.which("ufw") is not None
    if not there and not module.check_mode:
        module.fail_json(msg="ufw is not installed: sudo apt-get install ufw")

    rules = added_rules(module) if there else []
    enabled = setting(STATE, "ENABLED") == "yes"
    # A fresh UFW has drop already; what it isn't is enabled.
    default_input = setting(DEFAULTS, "DEFAULT_INPUT_POLICY") if there else "drop"

    def kernel_ok() -> bool:
        return closed_by_default(module) and all(loaded(module, port) for port in ports)

    actions = plan(rules, ports, default_input, enabled, there and enabled and kernel_ok())
    for port in module.params["never"]:
        for rule in rules:
            if opens(rule, port):
                module.warn(f"UFW opens port {port} to the outside (rule `ufw {rule}`): sudo ufw delete {rule}")

    lines = [f"ufw {' '.join(action)}" for action in actions]
    if actions and not module.check_mode:
        if enabled and not kernel_ok():
            drop_flushed_chains(module)
        for action in actions:
            rc, out, err = module.run_command(["ufw", *action])
            if rc != 0:
                module.fail_json(msg=f"ufw {' '.join(action)}: {(err or out).strip()}. See: sudo ufw status verbose")
        remember("ufw", [" ".join(action) for action in actions if action != ["reload"]])
        if not kernel_ok():
            _, state, _ = module.run_command(["iptables", "-S"])
            module.fail_json(
                msg=f"UFW reports success but the kernel's rules don't open {ports} or don't close the rest. "
                f"See: sudo iptables -S; sudo ufw status verbose\n{state[-1500:]}"
            )
    result: dict[str, Any] = {
        "changed": bool(actions),
        "actions": lines,
        "rules": rules,
        "diff": {"before": "", "after": "".join(f"{line}\n" for line in lines)},
    }
    module.exit_json(**result)


if __name__ == "__main__":
    main()
