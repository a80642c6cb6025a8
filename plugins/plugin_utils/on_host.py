# SPDX-License-Identifier: Apache-2.0
"""Has a host run its own copy of a check, where that is the very one that a module would bring along.

A module of Ansible is packed, sent, unpacked and compiled anew on every host at every call: four times the work of the check
itself. Role nox_tools has left the same files there. Their digests are compared first, so what answers is what this
playbook would have sent; a host that has other ones, or none, or no answer, is sent the module.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from functools import cache
from pathlib import Path
from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.nox.platform.plugins.module_utils.host_state import PACKAGE

HERE = Path(__file__).resolve().parents[1] / "module_utils"
START = Path(__file__).resolve().parents[2] / "roles/nox_tools/files/host_state/__init__.py"
THERE = Path("/usr/local/share/nox/host_state")
CODE = """
import importlib, json, sys
place, name, arguments = sys.argv[1:]
sys.path.append(place)
print(json.dumps(importlib.import_module(f"host_state.{name}").answer(*json.loads(arguments))))
"""


@cache
def digests() -> str:
    """As sha256sum reads them."""
    sources = {name: START if name == "__init__" else HERE / f"{name}.py" for name in PACKAGE}
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {THERE}/{name}.py\n" for name, path in sources.items()]
    return "".join(lines)


def command(python: str, name: str, *arguments: Any) -> str:
    """For the host's shell: compare, then run. No bytecode is believed that lies beside the sources: it has a place of its
    own, by their digest, which root alone can write."""
    place = f"/run/nox-host-state/{hashlib.sha256(digests().encode()).hexdigest()[:12]}"
    words = [python, "-I", "-X", f"pycache_prefix={place}", "-c", CODE, str(THERE.parent), name, json.dumps(arguments)]
    return f"printf %s {shlex.quote(digests())} | sha256sum --check --status && exec {shlex.join(words)}"


def ask(action: ActionBase, task_vars: dict[str, Any] | None, name: str, *arguments: Any) -> dict[str, Any] | None:
    """What answer() of `name`, host_state or host_status, says in the host's own copy; None where it has to be sent. Raises what a connection raises."""
    python = str((task_vars or {}).get("ansible_python_interpreter") or "/usr/bin/python3")
    done = action._low_level_execute_command(command(python, name, *arguments))
    try:
        found = json.loads(done["stdout"].strip().splitlines()[-1]) if done["rc"] == 0 else None
    except (ValueError, IndexError):
        return None
    return found if isinstance(found, dict) else None
