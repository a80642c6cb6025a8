# SPDX-License-Identifier: Apache-2.0
"""Has a host run its own copy of what a module does, where that is the very one that the module would bring along.

A module of Ansible is packed, sent, unpacked and compiled anew on every host at every call: four times the work of a check, and
a quarter of a second of one core. Role nox_tools has left the same files there. Their digests are compared first, so what
answers is what this playbook would have sent; a host that has other ones, or none, or no answer, is sent the module.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from functools import cache
from pathlib import Path
from typing import Any

from ansible import constants as C
from ansible.plugins.action import ActionBase
from ansible_collections.nox.platform.plugins.module_utils.host_state import PACKAGE

HERE = Path(__file__).resolve().parents[1] / "module_utils"
START = Path(__file__).resolve().parents[2] / "roles/nox_tools/files/host_state/__init__.py"
THERE = Path("/usr/local/share/nox/host_state")
CODE = """
import importlib, json, sys
place, name, options = sys.argv[1:]
sys.path.append(place)
logic = importlib.import_module(f"host_state.{name}")
try:
    found = logic.answer(json.loads(options))
except OSError as error:  # as module_utils/answers.py says it
    found = {"failed": True, "msg": str(error)}
print(json.dumps(found))
"""


class OwnCopyAction(ActionBase):  # type: ignore[misc]
    """The control side of a module that is nothing but answer() of a file in the package. Subclasses name both."""

    LOGIC: str
    """The file of module_utils whose answer(options) the module returns."""
    ARGUMENTS: dict[str, Any]
    """The module's own argument_spec, and what else AnsibleModule takes to check them."""

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        return {**result, **self.answer(self._task.args, task_vars)}

    def answer(self, arguments: dict[str, Any], task_vars: dict[str, Any] | None) -> dict[str, Any]:
        """What the host's own copy says, or the module where it has to be sent."""
        _, options = self.validate_argument_spec(**self.ARGUMENTS)
        options |= {
            name: value for name, value in arguments.items() if name not in self._task.args
        }  # a piece of an archive
        found = ask(self, task_vars, self.LOGIC, {**options, "check_mode": self._task.check_mode})
        if found is not None:
            return {**found, "sent": False}
        sent: dict[str, Any] = self._execute_module(module_args=dict(arguments), task_vars=task_vars)
        return sent


@cache
def digests() -> str:
    """As sha256sum reads them."""
    sources = {name: START if name == "__init__" else HERE / f"{name}.py" for name in PACKAGE}
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {THERE}/{name}.py\n" for name, path in sources.items()]
    return "".join(lines)


def command(python: str, name: str, options: dict[str, Any], environment: str = "") -> str:
    """For the host's shell: compare, then run. No bytecode is believed that lies beside the sources: it has a place of its
    own, by their digest, which root alone can write."""
    place = f"/run/nox-host-state/{hashlib.sha256(digests().encode()).hexdigest()[:12]}"
    words = [python, "-I", "-X", f"pycache_prefix={place}", "-c", CODE, str(THERE.parent), name, json.dumps(options)]
    run = f"exec env {environment} {shlex.join(words)}" if environment else f"exec {shlex.join(words)}"
    return f"printf %s {shlex.quote(digests())} | sha256sum --check --status && {run}"


def interpreter(variables: dict[str, Any]) -> str:
    """The one that modules are run with on this host, or will be when Ansible has looked for it: then the system's."""
    facts = variables.get("ansible_facts") or {}
    told = variables.get("ansible_python_interpreter") or C.config.get_config_value("INTERPRETER_PYTHON")
    return str(facts.get("discovered_interpreter_python", "/usr/bin/python3") if str(told).startswith("auto") else told)


def ask(
    action: ActionBase, task_vars: dict[str, Any] | None, name: str, options: dict[str, Any]
) -> dict[str, Any] | None:
    """What answer() of `name` says in the host's own copy; None where it has to be sent. Raises what a connection raises."""
    python = interpreter(task_vars or {})
    environment = action._compute_environment_string()  # the playbook's keyword `environment`
    done = action._low_level_execute_command(command(python, name, options, environment))
    try:
        found = json.loads(done["stdout"].strip().splitlines()[-1]) if done["rc"] == 0 else None
    except (ValueError, IndexError):
        return None
    return found if isinstance(found, dict) else None
