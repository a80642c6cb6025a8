#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""An apt repository's signing key, accepted by its pinned fingerprint alone."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nox_apt_key
short_description: Installs a repository's signing key, pinned by fingerprint, with a word before it expires
description:
  - Takes the key from O(content), or from O(url) when it isn't on the host yet or about to expire there.
  - Refuses a key whose primary fingerprint isn't the pinned one, or that can't sign any more. Says so ahead of time
    when the signing key on the host is about to expire.
author: The Nox maintainers
options:
  content:
    description: The key, ASCII-armoured. Empty means fetch it from O(url).
    type: str
    default: ""
  url:
    description: Where the publisher offers the key.
    type: str
    required: true
  fingerprint:
    description: The primary key's fingerprint, 40 hexadecimal digits.
    type: str
    required: true
  path:
    description: The keyring to write, in the binary form apt reads.
    type: path
    required: true
  warn_days:
    description: From how many days before its expiry on the key is fetched anew and warned about.
    type: int
    default: 30
"""

EXAMPLES = r"""
- name: Trust Caddy's packages
  nox.platform.nox_apt_key:
    url: https://dl.cloudsmith.io/public/caddy/stable/gpg.key
    fingerprint: 65760C51EDEA2017CEA2CA15155B6D79CA56EA34
    path: /etc/apt/keyrings/caddy-stable.gpg
"""

RETURN = r"""
expires:
  description: When the last key that may sign expires, seconds since the epoch; 0 means never.
  returned: when a key is there
  type: int
"""

import tempfile
import time
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import fetch_url

USABLE = "-oqfum"  # gpg's validity letters that don't rule a key out; e: expired, r: revoked, d: disabled, i: invalid


def inspect(module: AnsibleModule, keyring: Path) -> tuple[list[str], int | None]:
    """Primary fingerprints, and the latest expiry among keys that may sign: 0 never, None when none may."""
    with tempfile.TemporaryDirectory() as home:
        _, out, _ = module.run_command(
            ["gpg", "--homedir", home, "--batch", "--with-colons", "--show-keys", str(keyring)]
        )
    primaries: list[str] = []
    expiries: list[int] = []
    kind = ""
    for line in out.splitlines():
        field = line.split(":")
        if field[0] in ("pub", "sub"):
            kind = field[0]
            if "s" in field[11] and field[1] not in "erdi":
                expiries.append(int(field[6] or 0))
        elif field[0] == "fpr" and kind == "pub":
            primaries.append(field[9])
            kind = ""
    if not expiries:
        return primaries, None
    return primaries, 0 if 0 in expiries else max(expiries)


def problem(primaries: list[str], expires: int | None, fingerprint: str) -> str:
    if primaries != [fingerprint]:
        return f"its primary fingerprint is {', '.join(primaries) or 'unreadable'}, pinned is {fingerprint}"
    if expires is None or (expires and expires < time.time()):
        return "it has expired or may not sign"
    return ""


def dearmor(module: AnsibleModule, text: bytes, directory: Path) -> Path:
    armoured, binary = directory / "key", directory / "key.gpg"
    armoured.write_bytes(text)
    if b"BEGIN PGP" in text:
        module.run_command(
            [
                "gpg",
                "--homedir",
                str(directory),
                "--batch",
                "--yes",
                "--output",
                str(binary),
                "--dearmor",
                str(armoured),
            ]
        )
        return binary
    return armoured


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "content": {"type": "str", "default": ""},
            "url": {"type": "str", "required": True},
            "fingerprint": {"type": "str", "required": True},
            "path": {"type": "path", "required": True},
            "warn_days": {"type": "int", "default": 30},
        },
        supports_check_mode=True,
    )
    path, fingerprint = Path(module.params["path"]), module.params["fingerprint"].replace(" ", "").upper()
    soon = time.time() + module.params["warn_days"] * 86400
    expires: int | None = None
    if path.is_file():
        primaries, expires = inspect(module, path)
        if not problem(primaries, expires, fingerprint) and (not expires or expires > soon):
            module.exit_json(changed=False, expires=expires)
    if module.check_mode:
        module.exit_json(changed=True)

    text = module.params["content"].encode()
    if not text:
        response, info = fetch_url(module, module.params["url"], timeout=30)
        if info["status"] != 200:
            module.fail_json(
                msg=f"can't fetch {module.params['url']}: {info['msg']}. Give a copy of the key with "
                "nox_proxy_caddy_key_file, or use Nginx: nox_proxy_kind: nginx"
            )
        text = response.read()
    with tempfile.TemporaryDirectory() as scratch:
        candidate = dearmor(module, text, Path(scratch))
        primaries, expires = inspect(module, candidate)
        wrong = problem(primaries, expires, fingerprint)
        if wrong:
            module.fail_json(
                msg=f"the key from {module.params['url'] if not module.params['content'] else 'the given file'} is refused: "
                f"{wrong}. If its publisher announces a new key, check the announcement and change "
                "nox_proxy_caddy_key_fingerprint."
            )
        data = candidate.read_bytes()
    if expires and expires < soon:
        day = time.strftime("%Y-%m-%d", time.gmtime(expires))
        module.warn(f"the signing key in {path} expires on {day}; its publisher offers no newer one yet")
    changed = not path.is_file() or path.read_bytes() != data
    if changed:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_bytes(data)
        temporary.chmod(0o644)
        temporary.replace(path)
    module.exit_json(changed=changed, expires=expires)


if __name__ == "__main__":
    main()
