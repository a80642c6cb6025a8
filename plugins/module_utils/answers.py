# SPDX-License-Identifier: Apache-2.0
"""A module that is nothing but answer() of a file beside this one, which a host may run by itself (plugin_utils/on_host.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible.module_utils.basic import AnsibleModule


def run_module(arguments: dict[str, Any], answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """All of a module: its options, checked by `arguments`, and check_mode, to answer(), and what that says to Ansible."""
    module = AnsibleModule(**arguments, supports_check_mode=True)
    try:
        found = {"changed": False, "sent": True, **answer({**module.params, "check_mode": module.check_mode})}
    except OSError as error:  # a full disk, a file that vanished: in its own words, as on_host.py says it, too
        module.fail_json(msg=str(error), sent=True)
    if found.pop("failed", False):
        module.fail_json(**found)
    module.exit_json(**found)
