#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""The service's settings file: what the inventory says, without losing what an operator wrote by hand."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nox_settings
short_description: Keeps /etc/default/nox-api, hand edits included
description:
  - Three values are compared for every key, as dpkg does for configuration files. The one in the file, the one this
    module wrote last (the record), and the one the inventory wants now. A value that differs from the record was
    written by hand and stays, with a warning; all others follow the inventory.
  - A line that no service could read (or a value outside its pattern) is kept as a comment, and the key gets its value
    from the inventory. Comments, order and unknown keys are never touched.
  - The token is made on the host at first, 64 hexadecimal characters from the kernel's random source. It is never
    returned, shown in a diff, or written to the record (which holds its SHA-256).
author: The Nox maintainers
options:
  path:
    description: The settings file; written with mode 0600, owned by root.
    type: path
    default: /etc/default/nox-api
  record:
    description: Where the last written values are remembered.
    type: path
    default: /var/lib/nox/settings.json
  settings:
    description: The keys, in the order in which a new file has them.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: The key, for example NOX_PORT.
        type: str
        required: true
      value:
        description: What the inventory wants.
        type: str
        required: true
      comment:
        description: One line above the key when it is added.
        type: str
        default: ""
      pattern:
        description: A regular expression the whole value must match to be usable.
        type: str
        default: ".*"
  token:
    description: The API token. Empty means keep the host's, or make one where there is none.
    type: str
    default: ""
  lost:
    description:
      - Where a lost file's contents are looked for. C(token) is the running front's own copy; nothing but the token is
        taken from it, because its owner is no root. C(state) is the record of M(nox.platform.nox_state), with the
        hand edits that were there when it was written.
    type: dict
    default: {}
    suboptions:
      token:
        description: The front's copy of the settings.
        type: path
        default: /run/nox-api/settings
      state:
        description: The record of the host's state.
        type: path
        default: /var/lib/nox/state.json
  force:
    description: The inventory wins over hand edits (the token excepted, unless O(token) is given).
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: Write the settings
  nox.platform.nox_settings:
    settings:
      - {name: NOX_PORT, value: "8080", pattern: "[0-9]+", comment: TCP port}
"""

RETURN = r"""
settings:
  description: Key → value as the services will read them, the token excepted.
  returned: always
  type: dict
kept:
  description: Keys whose hand-written value was kept against the inventory.
  returned: always
  type: list
  sample: [{name: NOX_TIMEOUT, kept: "60", inventory: "20"}]
token:
  description: What was done with the token; one of kept, generated, given.
  returned: always
  type: str
"""

import hashlib
import json
import re
import secrets
import stat
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nox.platform.plugins.module_utils.settings_file import (
    LINE,
    TOKEN_MIN_LENGTH,
    assign,
    parse_settings,
    read_written,
    token_state,
    write_private,
)

TOKEN = "NOX_API_TOKEN"
HEADER = """\
# Settings of nox-api. Values written here by hand survive reruns of the playbooks.
# Apply: sudo systemctl reload nox-api   (NOX_BIND_ADDR and NOX_PORT: restart)
"""
SET_ASIDE = "# not usable, set aside by Ansible: "


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def masked(text: str) -> str:
    """The text for a diff: every token's value hidden, in comments too."""
    return re.sub(r"(?m)^([^\n]*TOKEN[A-Z_]*\s*=).*$", r"\1<hidden>", text)


def set_aside_unusable(text: str, patterns: dict[str, str]) -> tuple[str, list[str]]:
    """Turns lines that can't be read, and values outside their pattern, into comments."""
    kept, problems = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            kept.append(line)
            continue
        match = LINE.match(line)
        if not match:
            problems.append(f"line {number} is no KEY=value")
            kept.append(SET_ASIDE + line)
            continue
        name = match.group(1)
        value = parse_settings(line)[name]
        if name in patterns and not re.fullmatch(patterns[name], value):
            problems.append(f"line {number}: {name}={value!r} is not a usable value")
            kept.append(SET_ASIDE + line)
            continue
        kept.append(line)
    return "".join(f"{line}\n" for line in kept), problems


def merge(
    present: dict[str, str], recorded: dict[str, str], wanted: dict[str, str], force: bool
) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Three-way merge; returns the values to have and the hand edits kept against the inventory."""
    result, kept = {}, []
    for name, value in wanted.items():
        by_hand = name in present and present[name] != recorded.get(name)
        if by_hand and not force and present[name] != value:
            result[name] = present[name]
            kept.append({"name": name, "kept": present[name], "inventory": value})
        else:
            result[name] = value
    return result, kept


def recovered(lost: dict[str, str], patterns: dict[str, str]) -> dict[str, str]:
    """What is still known of a lost settings file: usable values only."""
    found: dict[str, str] = {}
    try:
        state = json.loads(Path(lost["state"]).read_text(encoding="utf-8"))
        for name, value in state.get("settings", {}).items():
            if name in patterns and re.fullmatch(patterns[name], str(value)):
                found[name] = str(value)
    except (OSError, ValueError, AttributeError):
        pass
    try:
        token = parse_settings(Path(lost["token"]).read_text(encoding="utf-8", errors="replace")).get(TOKEN)
    except OSError:
        token = None
    if token and token_state(token) == "ok":
        found[TOKEN] = token
    return found


def is_private(path: Path) -> bool:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (0, 0, 0o600)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "default": "/etc/default/nox-api"},
            "record": {"type": "path", "default": "/var/lib/nox/settings.json"},
            "settings": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "value": {"type": "str", "required": True},
                    "comment": {"type": "str", "default": ""},
                    "pattern": {"type": "str", "default": ".*"},
                },
            },
            "token": {"type": "str", "default": "", "no_log": True},
            "lost": {
                "type": "dict",
                "default": {},
                "apply_defaults": True,
                "options": {
                    "token": {"type": "path", "default": "/run/nox-api/settings", "no_log": False},
                    "state": {"type": "path", "default": "/var/lib/nox/state.json"},
                },
            },
            "force": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    path, record_path = Path(module.params["path"]), Path(module.params["record"])
    entries = module.params["settings"]
    given = module.params["token"]
    for entry in entries:
        if not re.fullmatch(entry["pattern"], entry["value"]):
            module.fail_json(msg=f"{entry['name']}={entry['value']!r}: must match {entry['pattern']}")
    if given and token_state(given) != "ok":
        module.fail_json(
            msg=f"nox_api_token is a placeholder, malformed, or shorter than {TOKEN_MIN_LENGTH} characters. "
            "Leave it empty to have one made on the host, or make one: openssl rand -hex 32"
        )

    try:
        before = path.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        before = ""
    recorded = read_written(record_path)

    text, problems = set_aside_unusable(before or HEADER, {e["name"]: e["pattern"] for e in entries})
    present = parse_settings(text)
    for problem in problems:
        module.warn(f"{path}: {problem}; kept as a comment")

    if not present:
        for name, value in recovered(module.params["lost"], {e["name"]: e["pattern"] for e in entries}).items():
            text = assign(text, name, value, "recovered")
            present[name] = value
            # never with its value: one of them is the token
            module.warn(f"{path} was lost: {name} recovered")

    # -- the token
    token = present.get(TOKEN, "")
    state = token_state(token)
    if state not in ("ok", "absent"):
        module.fail_json(
            msg=f"{path}: NOX_API_TOKEN is {state}. Write a good one (openssl rand -hex 32), or delete the line "
            "to have one made."
        )
    by_hand = bool(token) and digest(token) != recorded.get("token_sha256")
    if token and (not given or given == token or (by_hand and not module.params["force"])):
        token_is = "kept"
        if given and given != token:
            module.warn(
                "the host's token was changed by hand and stays; nox_api_token from the inventory is not applied "
                "(nox_settings_force=true applies it)"
            )
    elif given:
        token, token_is = given, "given"
    else:
        token, token_is = secrets.token_hex(32), "generated"
    if token_is != "kept":
        comment = "Bearer token of the HTTP API. Make another: openssl rand -hex 32"
        text = assign(text, TOKEN, token, comment)

    # -- all other keys
    values, kept = merge(
        present,
        recorded.get("values", {}),
        {e["name"]: e["value"] for e in entries},
        module.params["force"],
    )
    for one in kept:
        module.warn(
            f"{one['name']}={one['kept']} was written by hand on the host and stays; the inventory says "
            f"{one['inventory']} (nox_settings_force=true applies the inventory)"
        )
    for entry in entries:
        if present.get(entry["name"]) != values[entry["name"]]:
            text = assign(text, entry["name"], values[entry["name"]], entry["comment"])

    # Hand edits stay out of the record: they must look hand-written at the next run, too.
    by_hand_names = {one["name"] for one in kept}
    record: dict[str, Any] = {
        "values": {k: v for k, v in values.items() if k not in by_hand_names},
        "token_sha256": recorded.get("token_sha256") if token_is == "kept" and by_hand else digest(token),
    }
    record_text = json.dumps(record, indent=1, sort_keys=True) + "\n"
    changed = text != before or not is_private(path)
    record_changed = record != recorded or not is_private(record_path)

    if not module.check_mode:
        if changed:
            write_private(path, text)
        if record_changed:
            write_private(record_path, record_text)
    module.exit_json(
        changed=changed or record_changed,
        diff={
            "before_header": str(path),
            "after_header": str(path),
            "before": masked(before),
            "after": masked(text),
        },
        settings=values,
        kept=kept,
        token=token_is,
        restart_needed=changed
        and any(present.get(name) != values.get(name) for name in ("NOX_BIND_ADDR", "NOX_PORT", "NOX_BACKEND")),
    )


if __name__ == "__main__":
    main()
