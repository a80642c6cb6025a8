"""The Ansible inventory of a lab and the pinned host keys that go with it."""

from __future__ import annotations

import re
from pathlib import Path

from lab.state import Host, Lab, LabError, write_atomic

_HEADER = "# Written by `python3 -m lab up` for the lab {lab}; changes are lost.\n"
_OWNER = re.compile(r"# Written by `python3 -m lab up` for the lab (\S+);")


def hosts_yml(lab: Lab, known_hosts: Path) -> str:
    """The inventory's text: group ``nox`` with every host of the lab."""
    ssh_args = (
        f"-o UserKnownHostsFile={known_hosts} -o GlobalKnownHostsFile=/dev/null -o StrictHostKeyChecking=yes "
        "-o HashKnownHosts=no -o IdentitiesOnly=yes -o IdentityAgent=none"
    )
    lines = [
        _HEADER.format(lab=lab.name).rstrip(),
        "nox:",
        "  vars:",
        "    ansible_user: root",
        f'    ansible_ssh_private_key_file: "{lab.key}"',
        f'    ansible_ssh_common_args: "{ssh_args}"',
        "    ansible_python_interpreter: /usr/bin/python3",
        f'    lab_name: "{lab.name}"',
        "  hosts:" if lab.hosts else "  hosts: {}",
    ]
    for host in lab.hosts.values():
        lines += [
            f'    "{host.name}":',
            f'      ansible_host: "{host.address}"',
            f'      lab_kind: "{host.kind}"',
            f'      lab_suite: "{host.suite}"',
        ]
    return "\n".join(lines) + "\n"


def known_hosts(hosts: list[Host], public_keys: dict[str, str]) -> str:
    """One line per host; ``public_keys`` holds the text of each host's public key by its name."""
    return "".join(
        f"{host.address} {' '.join(public_keys[host.name].split()[:2])}\n" for host in hosts
    )


def owner(directory: Path) -> str | None:
    """The lab whose inventory is in a directory; None when there is none.

    Raises LabError when the hosts.yml there wasn't written by a lab.
    """
    path = directory / "hosts.yml"
    if not path.exists():
        return None
    match = _OWNER.match(path.read_text())
    if not match:
        raise LabError(
            f"{path} was not written by the lab and is left alone; choose another directory with --inventory"
        )
    return match[1]


def write(lab: Lab) -> None:
    """Write the lab's inventory into its state directory and into the directory asked for."""
    hosts = list(lab.hosts.values())
    keys = {host.name: (host.dir / "ssh_host_ed25519_key.pub").read_text() for host in hosts}
    directories = [lab.dir / "inventory"] + ([Path(lab.inventory)] if lab.inventory else [])
    for directory in directories:
        directory.mkdir(parents=True, exist_ok=True)
        # keys first: who reads the new hosts finds their keys
        write_atomic(directory / "known_hosts", known_hosts(hosts, keys))
        write_atomic(directory / "hosts.yml", hosts_yml(lab, directory / "known_hosts"))


def remove(lab: Lab) -> None:
    """Remove the lab's inventory from the directory it was asked for, unless another lab's has taken its place."""
    if lab.inventory:
        directory = Path(lab.inventory)
        path = directory / "hosts.yml"
        match = _OWNER.match(path.read_text()) if path.exists() else None
        if match and match[1] == lab.name:
            for name in ("hosts.yml", "known_hosts"):
                (directory / name).unlink(missing_ok=True)
            if not any(directory.iterdir()):
                directory.rmdir()
