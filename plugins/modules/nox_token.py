#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Another API token in the settings file, the old one beside it for a while."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nox_token
short_description: Changes the API token without shutting clients out
description:
  - V(rotated) writes a new token to C(NOX_API_TOKEN) and keeps the old one as C(NOX_API_TOKEN_PREVIOUS), which the service
    accepts until C(NOX_API_TOKEN_PREVIOUS_UNTIL). V(settled) removes the old one.
  - No token is ever returned or shown. The service has to be reloaded afterwards.
author: The Nox maintainers
options:
  state:
    description: What to do.
    type: str
    choices: [rotated, settled]
    required: true
  token:
    description: The new token. Empty means that one is made on the host.
    type: str
    default: ""
  overlap:
    description: Seconds for which the old token is accepted, too. 0 means not at all.
    type: int
    default: 3600
  path:
    description: The settings file.
    type: path
    default: /etc/default/nox-api
  record:
    description: Where M(nox.platform.nox_settings) remembers what it wrote, the token's SHA-256 among it.
    type: path
    default: /var/lib/nox/settings.json
"""

EXAMPLES = r"""
- name: Change the token
  nox.platform.nox_token:
    state: rotated
    overlap: 86400
"""

RETURN = r"""
until:
  description: When the old token ends, UTC; empty where there is no old one.
  returned: always
  type: str
reload_needed:
  description: Whether the service has to read its settings again.
  returned: always
  type: bool
overlap_left:
  description: Seconds until then.
  returned: always
  type: int
"""

import hashlib
import json
import math
import re
import secrets
import time
from calendar import timegm
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nox.platform.plugins.module_utils.settings_file import (
    LINE,
    assign,
    parse_settings,
    read_written,
    token_state,
    write_private,
)

TOKEN = "NOX_API_TOKEN"
PREVIOUS = "NOX_API_TOKEN_PREVIOUS"
UNTIL = "NOX_API_TOKEN_PREVIOUS_UNTIL"
FORMAT = "%Y-%m-%dT%H:%M:%SZ"
COMMENT = "The token before, accepted for a while; written and removed by playbooks/rotate_token.yml"


def without(text: str, names: tuple[str, ...]) -> str:
    """The text without these keys, and without the comment written with them."""
    lines = text.splitlines()
    gone = {at for at, line in enumerate(lines) if (found := LINE.match(line)) and found.group(1) in names}
    for at, line in enumerate(lines):
        if line == f"# {COMMENT}":
            gone |= {at} | ({at - 1} if at and not lines[at - 1] else set())
    return "".join(f"{line}\n" for at, line in enumerate(lines) if at not in gone)


def ends(present: dict[str, str]) -> float:
    """When the old token ends; 0 where there is none, infinity where no end was written."""
    if not present.get(PREVIOUS):
        return 0.0
    try:
        return float(timegm(time.strptime(present.get(UNTIL, ""), FORMAT)))
    except ValueError:
        return math.inf


def rotate(text: str, new: str, overlap: int) -> str:
    """The settings with a new token, and the old one beside it."""
    old = parse_settings(text)[TOKEN]
    text = assign(without(text, (PREVIOUS, UNTIL)), TOKEN, new, "")
    if overlap:
        text = assign(text, PREVIOUS, old, COMMENT)
        text = assign(text, UNTIL, time.strftime(FORMAT, time.gmtime(time.time() + overlap)), "")
    return text


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["rotated", "settled"], "required": True},
            "token": {"type": "str", "default": "", "no_log": True},
            "overlap": {"type": "int", "default": 3600},
            "path": {"type": "path", "default": "/etc/default/nox-api"},
            "record": {"type": "path", "default": "/var/lib/nox/settings.json"},
        },
        supports_check_mode=True,
    )
    path, record_path = Path(module.params["path"]), Path(module.params["record"])
    given, overlap = module.params["token"], module.params["overlap"]
    if overlap < 0:
        module.fail_json(msg=f"overlap={overlap}: must be 0 or more seconds")
    if given and token_state(given) != "ok":
        module.fail_json(msg=f"The new token is {token_state(given)}. Make one: openssl rand -hex 32")
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        module.fail_json(msg=f"{path}: {error.strerror}. Install first, or repair.")
    present = parse_settings(text)
    left = ends(present) - time.time()
    new_text = text
    if module.params["state"] == "settled":
        new_text = without(text, (PREVIOUS, UNTIL))
    elif token_state(present.get(TOKEN)) != "ok":
        module.fail_json(msg=f"{path}: {TOKEN} is {token_state(present.get(TOKEN))}. Install first, or repair.")
    elif given != present[TOKEN]:
        if left > 0:
            module.fail_json(
                msg=f"The token before is still accepted until {present.get(UNTIL, 'it is removed')}; another change would shut "
                "out who uses it. Wait, or end it now: playbooks/rotate_token.yml -e nox_token_end=true (noxctl rotate-token --end)"
            )
        new_text = rotate(text, given or secrets.token_hex(32), overlap)
    if new_text != text and not module.check_mode:
        write_private(path, new_text)
    present = parse_settings(new_text)
    record = read_written(record_path)
    # Or the next install would take the token for one that was changed by hand.
    digest = hashlib.sha256(present.get(TOKEN, "").encode()).hexdigest()
    if (
        module.params["state"] == "rotated"
        and record
        and record.get("token_sha256") != digest
        and not module.check_mode
    ):
        record["token_sha256"] = digest
        write_private(record_path, json.dumps(record, indent=1, sort_keys=True) + "\n")
    end = ends(present)
    shown = re.sub(r"(?m)^(\s*NOX_API_TOKEN(?:_PREVIOUS)?\s*=).*$", r"\1<hidden>", new_text)
    before = re.sub(r"(?m)^(\s*NOX_API_TOKEN(?:_PREVIOUS)?\s*=).*$", r"\1<hidden, another one>", text)
    module.exit_json(
        changed=new_text != text,
        reload_needed=new_text != text,
        until=present.get(UNTIL, "") if end else "",
        overlap_left=max(0, math.ceil(end - time.time())) if end not in (0.0, math.inf) else 0,
        diff={"before": before if new_text != text else shown, "after": shown},
    )


if __name__ == "__main__":
    main()
