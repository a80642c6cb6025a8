# SPDX-License-Identifier: Apache-2.0
"""The control side of nox_status: what asks needn't be sent to a host that has it."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.nox.platform.plugins.plugin_utils.on_host import ask


class ActionModule(ActionBase):  # type: ignore[misc]
    """See the module of this name."""

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """The host's answer."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        probe = str(self._task.args.get("probe", 0))
        if set(self._task.args) <= {"probe"} and probe.isdecimal():  # anything else the module refuses
            found = ask(self, task_vars, "host_status", int(probe))
            if found:
                return {**result, **found, "changed": False, "sent": False}
        return {**result, **self._execute_module(task_vars=task_vars)}
