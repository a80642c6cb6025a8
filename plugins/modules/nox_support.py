#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""What somebody needs to see who helps with a host, without its secrets."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nox_support
short_description: Packs logs, states and versions of a host for those who help
description:
  - Needs nothing of Nox to work. What can't be asked is in the bundle with the reason.
  - The tokens' own values are struck out of everything, wherever they appear, also in their usual encodings, and so is
    whatever is written like a secret. Programs and files of users are not collected.
author: The Nox maintainers
options:
  path:
    description: The bundle on the host, written with mode 0600.
    type: path
    required: true
  owner:
    description: Who may read it; the ssh user, who fetches it.
    type: str
    default: root
  lines:
    description: How many last lines of each log.
    type: int
    default: 2000
"""

EXAMPLES = r"""
- name: Pack
  nox.platform.nox_support:
    path: /var/tmp/nox/support.tar.gz
"""

RETURN = r"""
parts:
  description: What is in the bundle.
  returned: always
  type: list
struck:
  description: How many times something secret was struck out.
  returned: always
  type: int
"""

import base64
import io
import os
import pwd
import re
import subprocess
import tarfile
import time
from collections import deque
from pathlib import Path
from urllib.parse import quote

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nox.platform.plugins.module_utils.settings_file import LINE, unquote

STRUCK = "<struck out>"
SETTINGS = (Path("/etc/default/nox-api"), Path("/run/nox-api/settings"))
UNITS = ("nox-api.service", "nox-runner.service", "nox-runner.socket")
FILES = (
    "/etc/default/nox-api",
    "/etc/os-release",
    "/opt/nox/manifest.json",
    "/var/lib/nox/state.json",
    "/var/lib/nox/settings.json",
    "/etc/caddy/Caddyfile",
    "/etc/caddy/sites-enabled/nox-api.caddy",
    "/etc/nginx/sites-enabled/nox-api",
    "/etc/logrotate.d/nox-api",
)
LOGS = ("/var/log/nox-api/nox-api.log", "/var/log/nox-api/error.log", "/var/log/nginx/error.log")
COMMANDS = {
    "nox-debug.json": "nox-debug full --json",
    "nox-debug.txt": "nox-debug full",
    "units.txt": f"systemctl status --no-pager --full --lines=0 {' '.join(UNITS)} caddy.service nginx.service ufw.service",
    "unit-files.txt": f"systemctl cat --no-pager {' '.join(UNITS)}",
    "failed.txt": "systemctl list-units --failed --no-pager",
    "versions.txt": "dpkg-query --show systemd bubblewrap libseccomp2 caddy nginx ufw python3 openssh-server logrotate",
    "kernel.txt": "uname -a",
    "sockets.txt": "ss -Hlntup",
    "firewall.txt": "ufw status verbose",
    "disk.txt": "df -h",
    "inodes.txt": "df -i",
    "memory.txt": "free -m",
    "load.txt": "uptime",
    "clock.txt": "timedatectl",
    "releases.txt": "ls -la /opt/nox /opt/nox/releases /opt/nox/archives",
    "accounts.txt": "getent passwd nox nox-api",
}
# Values of what is called like a secret, and credentials on their way.
PATTERNS = (
    re.compile(r"(?i)((?:token|secret|password|passwd|api_?key)[A-Za-z_]*[\"']?\s*[=:]\s*[\"']?)([^\s\"',;]{6,})"),
    re.compile(r"(?i)((?:bearer|basic)\s+)([A-Za-z0-9+/._~=-]{8,})"),
    re.compile(r"()(-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----)", re.DOTALL),
)


def secret_values() -> list[str]:
    """Everything that the settings call a token, and the forms in which it may stand elsewhere; the longest first."""
    found: set[str] = set()
    for path in SETTINGS:
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            # comments too: what was set aside there was a token once
            match = LINE.match(re.sub(r"^.*?(?=NOX_[A-Z_]*=)", "", line)) if "=" in line else None
            if (
                match
                and re.search("TOKEN|SECRET|KEY|PASSWORD", match.group(1))
                and not match.group(1).endswith("_UNTIL")
            ):
                found.add(unquote(match.group(2)))
    values = {value for value in found if len(value) >= 6}
    forms = set(values)
    for value in values:
        forms |= {quote(value, safe=""), value.encode().hex(), value[::-1]}
        # in any alignment of its base64
        for offset in range(3):
            text = base64.b64encode(b" " * offset + value.encode()).decode().rstrip("=")
            forms.add(text[4 if offset else 0 : -2])
    return sorted(forms, key=len, reverse=True)


def scrub(text: str, secrets: list[str]) -> tuple[str, int]:
    """The text without them, and how often something was struck out."""
    count = 0
    for value in secrets:
        count += text.count(value)
        text = text.replace(value, STRUCK)
    for pattern in PATTERNS:
        text, times = pattern.subn(lambda match: match.group(1) + STRUCK, text)
        count += times
    return text, count


def output(command: str) -> str:
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(
            command.split(), capture_output=True, text=True, errors="replace", timeout=60, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"$ {command}\n{error}\n"
    return f"$ {command}\n{done.stdout}{done.stderr}(exit status {done.returncode})\n"


def last_lines(path: str, count: int) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as handle:  # noqa: PTH123
            return "".join(deque(handle, maxlen=count))
    except OSError as error:
        return f"{path}: {error.strerror}\n"


def collect(lines: int) -> dict[str, str]:
    parts = {name: output(command) for name, command in COMMANDS.items()}
    for unit in (*UNITS, "caddy.service", "nginx.service"):
        parts[f"journal/{unit}.txt"] = output(f"journalctl --no-pager -q -n {lines} -o short-iso -u {unit}")
    parts["journal/kernel.txt"] = output("journalctl --no-pager -q -k -n 300 -o short-iso")
    for path in LOGS:
        parts[f"logs{path}"] = last_lines(path, lines)
    for path in FILES:
        parts[f"files{path}"] = last_lines(path, 10_000)
    return parts


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "owner": {"type": "str", "default": "root"},
            "lines": {"type": "int", "default": 2000},
        },
        supports_check_mode=True,
    )
    if module.check_mode:
        module.exit_json(changed=False, parts=[], struck=0)
    secrets = secret_values()
    parts, struck = collect(module.params["lines"]), 0
    descriptor = os.open(module.params["path"], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as handle:
        with tarfile.open(fileobj=handle, mode="w:gz") as bundle:
            for name, text in sorted(parts.items()):
                clean, count = scrub(text, secrets)
                struck += count
                data = clean.encode("utf-8", errors="replace")
                entry = tarfile.TarInfo(f"nox-support/{name}")
                entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
                bundle.addfile(entry, io.BytesIO(data))
        os.fchown(handle.fileno(), pwd.getpwnam(module.params["owner"]).pw_uid, -1)
    # The bundle changes nothing of the host's; where it lies is removed by who asked for it.
    module.exit_json(changed=False, parts=sorted(parts), struck=struck)


if __name__ == "__main__":
    main()
