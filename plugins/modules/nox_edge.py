#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Which hosts an edge sends requests to."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nox_edge
short_description: Takes hosts out of an edge and puts them back
description:
  - Keeps the list of hosts behind an edge and writes the ones that serve as C(/etc/caddy/nox-edge.upstreams). A host
    that was taken out stays out over reruns until it is put back.
  - With O(drain) or O(restore) Caddy is told at once, by a reload that ends no request.
  - The last host that serves is never taken out; that is a warning, not an error.
author: The Nox maintainers
options:
  hosts:
    description: All hosts, each as C([name, public name, address]); the first of the two that isn't empty, else the name, is where it answers.
    type: list
    elements: list
  drain:
    description: Names of hosts to take out.
    type: list
    elements: str
    default: []
  restore:
    description: Names of hosts to put back.
    type: list
    elements: str
    default: []
"""

EXAMPLES = r"""
- name: Send nothing to web1 while it changes
  nox.platform.nox_edge:
    drain: [web1]
"""

RETURN = r"""
serving:
  description: The hosts that requests go to.
  returned: always
  type: list
drained:
  description: The hosts that are taken out.
  returned: always
  type: list
"""

import json
import socket
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

STATE = Path("/var/lib/nox-edge.json")
UPSTREAMS = Path("/etc/caddy/nox-edge.upstreams")
MARK = "# managed by Ansible, module nox_edge\n"


def decide(
    hosts: dict[str, str], drained: list[str], drain: list[str], restore: list[str]
) -> tuple[list[str], list[str]]:
    """Who is out afterwards, and who should be but can't, because nobody would be left."""
    out = [name for name in hosts if (name in drained or name in drain) and name not in restore]
    refused = []
    if hosts and len(out) == len(hosts):
        refused = [next((name for name in reversed(out) if name in drain), out[-1])]
        out = [name for name in out if name not in refused]
    return out, refused


def unknown(hosts: dict[str, str]) -> list[str]:
    """Names of hosts whose address this machine can't find; an edge that is told such a thing serves nobody."""
    found = []
    for name, where in hosts.items():
        try:
            socket.getaddrinfo(where, 443)
        except OSError:
            found.append(f"{name} ({where})" if name != where else name)
    return found


def write(path: Path, text: str, mode: int) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.chmod(mode)
    temporary.replace(path)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "hosts": {"type": "list", "elements": "list"},
            "drain": {"type": "list", "elements": "str", "default": []},
            "restore": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    try:
        known: dict[str, Any] = json.loads(STATE.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {"hosts": {}, "drained": []}
    hosts: dict[str, str] = known["hosts"]
    if module.params["hosts"] is not None:
        hosts = {name: domain or address or name for name, domain, address in module.params["hosts"]}
        if lost := unknown(hosts):
            module.fail_json(
                msg=f"This edge can't find the address of {', '.join(lost)}. Give each an ansible_host or a nox_domain; "
                "if they have one, Ansible couldn't read it: is the vault's password missing?"
            )
    if not hosts:
        module.fail_json(msg="This host is no edge yet: playbooks/edge.yml")
    out, refused = decide(hosts, known["drained"], module.params["drain"], module.params["restore"])
    for name in refused:
        module.warn(f"{name} is the last host that serves: it stays")
    serving = [name for name in hosts if name not in out]
    brackets = {name: f"[{where}]" if ":" in where else where for name, where in hosts.items()}
    text = MARK + "to " + " ".join(f"https://{brackets[name]}" for name in serving) + "\n"
    state = json.dumps({"hosts": hosts, "drained": out}, indent=1) + "\n"
    old = UPSTREAMS.read_text(encoding="utf-8") if UPSTREAMS.exists() else ""
    changed = old != text or not STATE.exists() or STATE.read_text(encoding="utf-8") != state
    if changed and not module.check_mode:
        write(UPSTREAMS, text, 0o644)
        if module.params["hosts"] is None and old != text:
            rc, out_text, err = module.run_command(["systemctl", "reload", "caddy.service"])
            if rc != 0:
                write(UPSTREAMS, old, 0o644)
                module.fail_json(
                    msg=f"Caddy doesn't take the new list, the old one is back: {(err or out_text).strip()}"
                )
        write(STATE, state, 0o644)
    module.exit_json(
        changed=changed,
        serving=serving,
        drained=out,
        diff={"before": old, "after": text, "before_header": str(UPSTREAMS), "after_header": str(UPSTREAMS)},
    )


if __name__ == "__main__":
    main()
