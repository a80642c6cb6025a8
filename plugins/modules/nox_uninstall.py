#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Takes Nox off a host, and what its roles brought along with it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nox_uninstall
short_description: Removes everything that Nox's roles have made on a host
description:
  - Units, files, accounts, the proxy's site, the firewall's rules, and the packages that were not there before Nox
    (by the record of the install, F(/var/lib/nox/brought.json)) as far as nothing else needs them now.
  - What others had on the host stays. A host without Nox is left as it is.
author: The Nox maintainers
options:
  keep:
    description:
      - What stays. V(config) is the settings file with the token, V(sandbox) the files with the account that owns them,
        V(logs), V(history), V(packages) with the firewall as it is.
    type: list
    elements: str
    choices: [config, sandbox, logs, history, packages]
    default: []
"""

EXAMPLES = r"""
- name: Take Nox away, but not the files
  nox.platform.nox_uninstall:
    keep: [sandbox]
"""

RETURN = r"""
actions:
  description: What was done (in check mode, would be done), in order.
  returned: always
  type: list
kept:
  description: What is still there, and why.
  returned: always
  type: list
"""

import grp
import os
import pwd
import re
import shutil
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nox.platform.plugins.module_utils import brought, host_files, kernel_settings
from ansible_collections.nox.platform.plugins.module_utils.brought_packages import removable
from ansible_collections.nox.platform.plugins.module_utils.settings_file import parse_settings

UNITS = ["nox-api.service", "nox-runner.service", "nox-runner.socket"]
CONFIG = "/etc/default/nox-api"
LOGS = "/var/log/nox-api"
HISTORY = "/var/lib/nox-api"
STEP = Path("/root/.step")
CADDYFILE = Path("/etc/caddy/Caddyfile")
IMPORT = re.compile(r"(?m)^import /etc/caddy/sites-enabled/\*\.caddy\n?")
SITES = {
    "caddy": ["/etc/caddy/sites-enabled/nox-api.caddy"],
    "nginx": ["/etc/nginx/sites-enabled/nox-api", "/etc/nginx/sites-available/nox-api"],
}
FILES = [
    *(f"/etc/systemd/system/{unit}" for unit in UNITS),
    "/opt/nox",
    "/etc/logrotate.d/nox-api",
    "/etc/nox",
    "/usr/local/bin/nox-debug",
    "/usr/local/bin/nox-monitor",
    "/usr/local/share/nox",
    "/var/lib/nox",
    "/var/lib/nox-acme",
    "/run/nox-host-state",
    "/run/nox-packages.json",
]
# What packages leave behind when they are purged: their programs made it, not their package. With the account.
LEFT_BY_PACKAGES = {
    "caddy": (["/etc/caddy", "/var/lib/caddy", "/var/log/caddy"], "caddy"),
    "nginx": (["/etc/nginx", "/var/lib/nginx", "/var/log/nginx"], ""),
    "ufw": (["/etc/ufw", "/etc/default/ufw"], ""),
    "logrotate": (["/var/lib/logrotate"], ""),
    "fail2ban": (["/etc/fail2ban", "/var/lib/fail2ban", "/var/log/fail2ban.log"], ""),
    "auditd": (["/etc/audit", "/var/log/audit"], ""),
    "unattended-upgrades": (["/var/log/unattended-upgrades", "/var/lib/unattended-upgrades"], ""),
}
ENVIRONMENT = {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C", "NEEDRESTART_MODE": "l"}


class Host:
    """What is done, or only noted in check mode."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.actions: list[str] = []
        self.kept: list[str] = []

    def run(self, *command: str) -> None:
        self.actions.append(" ".join(command))
        if not self.module.check_mode:
            rc, out, err = self.module.run_command(list(command), environ_update=ENVIRONMENT)
            if rc != 0:
                self.module.fail_json(
                    msg=f"{' '.join(command)}: {(err or out).strip()[-800:]}", actions=self.actions, kept=self.kept
                )

    def ask(self, *command: str) -> str:
        _, out, _ = self.module.run_command(list(command), environ_update=ENVIRONMENT)
        return str(out)

    def remove(self, path: str) -> None:
        if not os.path.lexists(path):
            return
        self.actions.append(f"remove {path}")
        if self.module.check_mode:
            return
        if Path(path).is_dir() and not Path(path).is_symlink():
            shutil.rmtree(path)
        else:
            Path(path).unlink()


def remove_units(host: Host) -> None:
    there = [unit for unit in UNITS if Path(f"/etc/systemd/system/{unit}").exists()]
    if there:
        host.run("systemctl", "disable", "--now", *there)


def loosen(host: Host, going: set[str]) -> None:
    """What nox_harden has made: its mounts, its files and lines in others' files, its kernel settings; sshd as before."""
    files = list(host_files.recorded())
    if "/etc/systemd/system/nox-mounts.service" in files:
        host.run("systemctl", "disable", "--now", "nox-mounts.service")
    for path in files:
        host.actions.append(f"put back {path}")
        if not host.module.check_mode:
            stays = host_files.take_back(path)
            host.kept += [stays] if stays else []
    names = list(brought.read().get(kernel_settings.RECORD, {}))
    host.actions += [f"put back {name}" for name in names]
    if not host.module.check_mode:
        kernel_settings.take_back()
    # Whoever reads one of these files and stays on the host reads it anew.
    if any(path.startswith("/etc/ssh/") for path in files):
        host.run("sshd", "-t")
        host.run("systemctl", "try-reload-or-restart", "ssh.service")
    if any(path.startswith("/etc/fail2ban/") for path in files) and "fail2ban" not in going:
        host.run("systemctl", "try-restart", "fail2ban.service")
    if any(path.startswith("/etc/audit/") for path in files) and shutil.which("augenrules"):
        host.run("augenrules", "--load")


def remove_sites(host: Host, going: set[str]) -> None:
    """Out of the proxies that stay; the ones that go take theirs along."""
    for proxy, paths in SITES.items():
        ours = [path for path in paths if os.path.lexists(path)]
        for path in ours:
            host.remove(path)
        if proxy == "caddy" and CADDYFILE.is_file() and proxy not in going:
            text = CADDYFILE.read_text(encoding="utf-8", errors="surrogateescape")
            if "managed by Ansible, role nox_proxy" in text:
                host.kept.append(f"{CADDYFILE}: written by Nox over the packaged one, serves nothing now")
            elif IMPORT.search(text) and not any(Path("/etc/caddy/sites-enabled").glob("*.caddy")):
                host.actions.append(f"remove the import from {CADDYFILE}")
                if not host.module.check_mode:
                    CADDYFILE.write_text(IMPORT.sub("", text), encoding="utf-8", errors="surrogateescape")
        if ours and proxy not in going:
            host.run("systemctl", "try-reload-or-restart", f"{proxy}.service")


def restore_firewall(host: Host, record: dict[str, list[str]], going: set[str]) -> None:
    """UFW as it was. As long as it stays switched on, what lets ssh in stays, too."""
    done = record.get("ufw", [])
    if not done or not shutil.which("ufw"):
        return
    switched_on = "--force enable" in done
    if switched_on:
        host.run("ufw", "--force", "disable")
    if "ufw" in going:
        drop_chains(host)
        return
    ssh = {"22/tcp", *(f"{port}/tcp" for port in ssh_ports(host))}
    for action in done:
        if not action.startswith("allow "):
            continue
        rule = action.split()[1]
        if rule in ssh and not switched_on:
            host.kept.append(f"ufw {action}: it lets ssh in")
        else:
            host.run("ufw", "--force", "delete", "allow", rule)


def drop_chains(host: Host) -> None:
    """A UFW that is switched off leaves its chains in the kernel, empty; they would stay until the next start."""
    for family in ("iptables", "ip6tables"):
        rules = host.ask(f"{family}-save")
        rest = "".join(line for line in rules.splitlines(keepends=True) if "ufw" not in line)
        if rest == rules:
            continue
        host.actions.append(f"remove UFW's chains from {family}")
        if not host.module.check_mode:
            host.module.run_command([f"{family}-restore"], data=rest, check_rc=True)


def ssh_ports(host: Host) -> list[str]:
    return re.findall(r"(?m)^port (\d+)$", host.ask("sshd", "-T"))


def remove_unowned(host: Host, path: str) -> None:
    """What no package claims now: another one may have its files there, as sshd has in /etc/ufw."""
    if host.module.check_mode or not os.path.lexists(path):
        return
    owned = set(re.findall(r"(?m)^[^/]*: (/.*)$", host.ask("dpkg-query", "--search", path, f"{path}/*")))
    for place, directories, files in os.walk(path, topdown=False):
        for name in [*files, *directories]:
            one = Path(place, name)
            if str(one) in owned:
                continue
            if one.is_dir() and not one.is_symlink():
                if not any(one.iterdir()):
                    one.rmdir()
            else:
                one.unlink()
    if path not in owned:
        host.actions.append(f"remove what is left in {path}")
        if Path(path).is_dir() and not any(Path(path).iterdir()):
            Path(path).rmdir()
        elif Path(path).is_file():
            Path(path).unlink()


def remove_accounts(host: Host, names: list[str]) -> None:
    for name in names:
        try:
            pwd.getpwnam(name)
        except KeyError:
            pass
        else:
            host.run("userdel", name)
        try:
            grp.getgrnam(name)
        except KeyError:
            continue
        if not host.module.check_mode:  # userdel has taken it along if it was the user's own
            host.run("groupdel", name)


def remove_home(host: Host, sandbox: str, keep: bool) -> None:
    """The sandbox, and the directories above it that are ours and empty."""
    if keep:
        host.kept.append(f"{sandbox}, with the account nox that owns it")
        return
    host.remove(sandbox)
    for path in ("/home/nox/nox", "/home/nox"):
        if Path(path).is_dir():
            others = [] if host.module.check_mode else sorted(os.listdir(path))  # noqa: PTH208
            if others:
                host.kept.append(f"{path}: holds {', '.join(others[:5])}, which isn't Nox's")
            else:
                host.remove(path)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "keep": {
                "type": "list",
                "elements": "str",
                "choices": ["config", "sandbox", "logs", "history", "packages"],
                "default": [],
            }
        },
        supports_check_mode=True,
    )
    keep, host, record = set(module.params["keep"]), Host(module), brought.read()
    try:
        settings = parse_settings(Path(CONFIG).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        settings = {}
    sandbox = settings.get("NOX_SANDBOX") or "/home/nox/nox/sandbox"
    if not record and Path("/opt/nox").is_dir():
        host.kept.append("packages: this install made no record of what it brought")
    going, needed = ([], []) if "packages" in keep else removable(host.ask, record.get("packages", []))
    host.kept += [f"package {name}: something else needs it" for name in needed]

    remove_units(host)
    loosen(host, set(going))
    remove_sites(host, set(going))
    if "packages" not in keep:
        restore_firewall(host, record, set(going))
    remove_home(host, sandbox, "sandbox" in keep)
    for name, path in (("config", CONFIG), ("logs", LOGS), ("history", HISTORY)):
        if name not in keep:
            host.remove(path)
        elif os.path.lexists(path):
            host.kept.append(path)
    for path in FILES:
        host.remove(path)
    owners = ["nox-api"] if not {"logs", "history"} & keep else []
    remove_accounts(host, [*owners, *(["nox"] if "sandbox" not in keep else [])])
    if going:
        host.run("apt-get", "-q", "-y", "purge", *going)
        for package, (paths, account) in LEFT_BY_PACKAGES.items():
            if package in going:
                for path in paths:
                    remove_unowned(host, path)
                remove_accounts(host, [account] if account else [])
        # Caddy's command makes this in the home of whoever asks it anything; with something in it, it is somebody's.
        if "caddy" in going and STEP.is_dir() and not any(STEP.iterdir()):
            host.remove(str(STEP))
    if host.actions:
        host.run("systemctl", "daemon-reload")
        host.run("systemctl", "reset-failed")
    module.exit_json(
        changed=bool(host.actions),
        actions=host.actions,
        kept=host.kept,
        diff={"before": "", "after": "".join(f"{action}\n" for action in host.actions)},
    )


if __name__ == "__main__":
    main()
