"""Two hardened hosts, each also the other one's stranger, and the playbooks."""

from __future__ import annotations

import json
import os
import shlex
import ssl
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import testinfra

INVENTORY = Path(os.environ["NOX_INVENTORY"])
PROJECT = Path(os.environ["ANSIBLE_CONFIG"]).parent
INVENTORIES = ["-i", str(INVENTORY), "-i", str(PROJECT / "molecule/harden/inventory")]
HOSTS = ("nox1", "nox2")  # Caddy, reached as root; Nginx, reached as an administrator
INDEXES: dict[str, int] = {}


def play(verb: str, *options: str, wanted: int = 0, **variables: Any) -> str:
    """Runs a playbook of the project; its output."""
    command = ["ansible-playbook", *INVENTORIES, str(PROJECT / f"playbooks/{verb}.yml"), *options]
    plain = {key: value for key, value in os.environ.items() if key != "ANSIBLE_FORCE_COLOR"}  # Molecule sets it
    environment = {**plain, "ANSIBLE_NOCOLOR": "1"}
    done = subprocess.run([*command, "-e", json.dumps(variables)], env=environment, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == wanted, output
    return output


class Site:
    """One host, and its service as a client on this side sees it."""

    def __init__(self, name: str) -> None:
        self.name = name
        # with sudo: the second host's login is not root's
        self.host: Any = testinfra.get_host(f"ansible://{name}?ansible_inventory={INVENTORY}")
        self.ca = INVENTORY / f".ca/{name}.crt"
        listed = subprocess.run(["ansible-inventory", *INVENTORIES, "--host", name], capture_output=True, check=True)
        self.about: dict[str, str] = json.loads(listed.stdout)
        self.address = self.about["ansible_host"]

    def run(self, command: str) -> str:
        return str(self.host.check_output("sh -c %s", command))

    def login(self, user: str = "root", command: str = "true") -> subprocess.CompletedProcess[str]:
        """A new connection, by the lab's key."""
        words = [
            "ssh",
            "-o",
            "ControlMaster=no",
            "-o",
            "ControlPath=none",
            "-o",
            "BatchMode=yes",
            "-o",
            "ConnectTimeout=10",
        ]
        words += shlex.split(self.about["ansible_ssh_common_args"])
        words += ["-i", self.about["ansible_ssh_private_key_file"], f"{user}@{self.address}", command]
        return subprocess.run(words, capture_output=True, text=True)

    def ssh_to(self, target: Site) -> str:
        """The beginning of a command on this host that logs in there, with the host keys that `target` has."""
        known = "/run/known_hosts"  # gone with the host; /run is no place where traces are looked for
        keys = target.run("cat /etc/ssh/ssh_host_*_key.pub").splitlines()
        lines = " ".join(shlex.quote(f"{target.address} {key}") for key in keys)
        self.run(f"printf '%s\\n' {lines} > {known}")
        return f"ssh -o BatchMode=yes -o ConnectTimeout=5 -o UserKnownHostsFile={known} {target.address}"

    def sshd(self) -> dict[str, str]:
        """What sshd makes of its configuration."""
        return dict(line.split(" ", 1) for line in self.run("sshd -T").splitlines() if " " in line)

    def token(self) -> str:
        return self.run("sed -n s/^NOX_API_TOKEN=//p /etc/default/nox-api")

    def ask(self, path: str, token: str, body: Any = None) -> tuple[int, Any]:
        context = ssl.create_default_context(cafile=str(self.ca))
        request = urllib.request.Request(
            f"https://{self.address}{path}",
            data=json.dumps(body).encode() if body is not None else None,
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        )
        try:
            answer = urllib.request.urlopen(request, timeout=60, context=context)
        except urllib.error.HTTPError as error:
            return error.code, None
        return answer.status, json.loads(answer.read())

    def listing(self) -> list[str]:
        script = (PROJECT / "tests/listing.sh").read_text()
        lines = str(self.host.check_output("bash -c %s", script)).splitlines()
        return [line.rstrip() for line in lines if line.strip()]

    def before(self, moment: str) -> list[str]:
        """The listing of an earlier moment, kept by prepare.yml."""
        return [
            line.rstrip() for line in (INVENTORY / f".{moment}-{self.name}").read_text().splitlines() if line.strip()
        ]


@pytest.fixture(scope="session")
def sites() -> list[Site]:
    return [Site(name) for name in HOSTS]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for moment, index in INDEXES.items():
        terminalreporter.write_line(f"lynis, {moment:9}  {index}")
