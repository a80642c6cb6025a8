# SPDX-License-Identifier: Apache-2.0
"""A module that is nothing but answer() of a file beside this one, which a host may run by itself (plugin_utils/on_host.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible.module_utils.basic import AnsibleModule


def leave(module: AnsibleModule, answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Ends the module with what it answers to its own options and check_mode."""
    found = {"changed": False, "sent": True, **answer({**module.params, "check_mode": module.check_mode})}
    if found.pop("failed", False):
        module.fail_json(**found)
    module.exit_json(**found)
