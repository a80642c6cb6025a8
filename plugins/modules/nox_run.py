#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Runs a script in a host's Nox, as a client would."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nox_run
short_description: Sends a script to the Nox of the host it runs on
description:
  - Posts to the API with the token that lies on the host, so that no token has to be known where the playbook runs.
  - A run that ended badly is a result, not a failure of the module. A host whose API can't be asked is one.
author: The Nox maintainers
options:
  code:
    description: The script's text.
    type: str
    required: true
  language:
    description: V(python) goes to C(/run_py), V(shell) to C(/run_sh).
    type: str
    choices: [python, shell]
    default: python
  args:
    description: The script's arguments.
    type: list
    elements: str
    default: []
  stdin:
    description: What the script reads.
    type: str
    default: ""
  timeout:
    description: Seconds after which the run is ended; the service's own limit where it isn't given.
    type: float
"""

EXAMPLES = r"""
- name: Ask every host for its Python
  nox.platform.nox_run:
    code: import platform; print(platform.python_version())
"""

RETURN = r"""
result:
  description: The API's answer, see C(POST /run_py) in the documentation.
  returned: success
  type: dict
"""

import json

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nox.platform.plugins.module_utils.local_api import Unanswered, call


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "code": {"type": "str", "required": True},
            "language": {"type": "str", "choices": ["python", "shell"], "default": "python"},
            "args": {"type": "list", "elements": "str", "default": []},
            "stdin": {"type": "str", "default": ""},
            "timeout": {"type": "float"},
        },
        supports_check_mode=True,
    )
    given = module.params
    if module.check_mode:
        module.exit_json(changed=False, skipped=True, msg="a check runs no script")
    path, name = ("/run_py", "code") if given["language"] == "python" else ("/run_sh", "cmd")
    body = {name: given["code"], "args": given["args"], "stdin": given["stdin"]}
    if given["timeout"] is not None:
        body["timeout"] = given["timeout"]
    try:
        # the service ends a run at its own limit; this only has to be longer
        status, answer = call("POST", path, body, seconds=3700.0)
        result = json.loads(answer)
    except (Unanswered, ValueError) as error:
        module.fail_json(msg=f"The API of this host can't be asked: {error}. On the host: sudo nox-debug")
    if status != 200:
        module.fail_json(msg=f"{status} {result.get('title', '')}: {result.get('detail', '')}".strip(": "))
    module.exit_json(changed=True, result=result)


if __name__ == "__main__":
    main()
