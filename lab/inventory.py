"""The Ansible inventory of a lab, and the pinned host keys that go with it."""

from __future__ import annotations

import re
from pathlib import Path

from lab.state import Host, Lab, LabError, write_atomic

# Hidden, because Ansible reads every other file of an inventory directory as an inventory.
KNOWN_HOSTS = ".known_hosts"
_OWNER = re.compile(r"# Written by `python3 -m lab[^`]*` for the lab (\S+);")


def hosts_yml(lab: Lab, known_hosts: Path) -> str:
    """The text of the inventory: a group ``nox`` with every host of the lab, but for those that are named ``edge…``:
    they are the group ``nox_edge``."""
    edges = [host for host in lab.hosts.values() if host.name.startswith("edge")]
    lines = [f"# Written by `python3 -m lab` for the lab {lab.name}; changes are lost."]
    lines += _group("nox", lab, [host for host in lab.hosts.values() if host not in edges], known_hosts)
    lines += _group("nox_edge", lab, edges, known_hosts) if edges else []
    return "\n".join(lines) + "\n"


def _group(name: str, lab: Lab, hosts: list[Host], known_hosts: Path) -> list[str]:
    ssh_options = (
        f"-o UserKnownHostsFile={known_hosts} -o GlobalKnownHostsFile=/dev/null "
        "-o StrictHostKeyChecking=yes -o IdentitiesOnly=yes -o IdentityAgent=none"
    )
    lines = [
        f"{name}:",
        "  vars:",
        "    ansible_user: root",
        f'    ansible_ssh_private_key_file: "{lab.key}"',
        f'    ansible_ssh_common_args: "{ssh_options}"',
        "    ansible_python_interpreter: /usr/bin/python3",
        f'    lab_name: "{lab.name}"',
        "  hosts:" if hosts else "  hosts: {}",
    ]
    for host in hosts:
        lines += [
            f'    "{host.name}":',
            f'      ansible_host: "{host.address}"',
            # With the host goes the connection that Ansible keeps open: the next host of this name
            # and address must not meet it. %%r, the user, is for ssh to fill in.
            f'      ansible_control_path: "{host.dir}/ssh-%%r"',
            # the same for testinfra, which doesn't know that variable and would connect anew for every command
            f'      ansible_ssh_extra_args: "-o ControlPath={host.dir}/ssh-%r"',
            f'      lab_kind: "{host.kind}"',
            f'      lab_suite: "{host.suite}"',
        ]
    return lines


def known_hosts(lab: Lab) -> str:
    """The public key of every host by its address, as the lab itself made them."""
    lines = []
    for host in lab.hosts.values():
        path = host.dir / "ssh_host_ed25519_key.pub"
        if path.exists():  # else an `up` was killed before it made the host
            key_type, key, *_ = path.read_text().split()
            lines.append(f"{host.address} {key_type} {key}\n")
    return "".join(lines)


def owner(directory: Path) -> str | None:
    """The lab whose inventory is in a directory; None when none is.

    Raises LabError when the inventory there isn't the work of a lab.
    """
    path = directory / "hosts.yml"
    if not path.exists():
        return None
    match = _OWNER.match(path.read_text())
    if not match:
        raise LabError(f"{path} isn't from a lab and stays; choose another place with --inventory")
    return match[1]


def write(lab: Lab) -> None:
    """Write the inventory to the lab's own directory, and to the one that was asked for."""
    for directory in [lab.dir / "inventory", *([Path(lab.inventory)] if lab.inventory else [])]:
        directory.mkdir(parents=True, exist_ok=True)
        # the keys first: who finds a new host in hosts.yml is to find its key
        write_atomic(directory / KNOWN_HOSTS, known_hosts(lab))
        write_atomic(directory / "hosts.yml", hosts_yml(lab, directory / KNOWN_HOSTS))


def remove(lab: Lab) -> None:
    """Remove the inventory that was asked for, unless another's has taken its place."""
    if lab.inventory is None:
        return
    directory = Path(lab.inventory)
    try:
        if owner(directory) != lab.name:
            return
    except LabError:
        return
    for name in ("hosts.yml", KNOWN_HOSTS):
        (directory / name).unlink(missing_ok=True)
    if not any(directory.iterdir()):
        directory.rmdir()
