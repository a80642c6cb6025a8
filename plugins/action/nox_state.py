# SPDX-License-Identifier: Apache-2.0
"""The control side of nox_state: the check itself needn't be sent to a host that has it."""

from __future__ import annotations

from typing import Any

from ansible.plugins.action import ActionBase
from ansible_collections.nox.platform.plugins.module_utils.host_state import RECORD
from ansible_collections.nox.platform.plugins.plugin_utils.on_host import ask


class ActionModule(ActionBase):  # type: ignore[misc]
    """See the module of this name."""

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """The check's answer."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        if self._task.args in ({}, {"state": "checked"}):
            found = ask(self, task_vars, "host_state", RECORD)
            if found:
                return {**result, **found, "changed": False, "sent": False}
        return {**result, **self._execute_module(task_vars=task_vars)}
