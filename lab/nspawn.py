"""Hosts as systemd-nspawn containers, each on an overlay over a shared base."""

from __future__ import annotations

import shlex

from lab import base, process
from lab.machine import default_mtu, mounted, need_tools, run
from lab.state import Host, Lab

BOOT_BOUND = 90  # seconds to ssh, also for a hundred hosts on two cores


def prepare(suite: str) -> str:
    """Have all that a start needs; returns the directory of the suite's base."""
    need_tools({"systemd-nspawn": "systemd-container"})
    return str(base.base_for(base.recipe(suite, "nspawn")))


def furnish(lab: Lab, host: Host, files: dict[str, str]) -> None:
    """Make a root for a new host, with these files (path -> text) its own."""
    _mount(host)
    # before systemd's own 80-container-host0.network, which asks DHCP
    files["etc/systemd/network/10-host0.network"] = network_file(lab, host, "host0")
    # The kernel counts a user's processes over all hosts, and Debian's unit allows Caddy's 512: too few for a hundred hosts.
    files["etc/systemd/system/caddy.service.d/lab.conf"] = "[Service]\nLimitNPROC=infinity\n"
    key = lab.key.with_suffix(".pub").read_text()
    base.write_files(host.root, base.host_files(files, key))


def network_file(lab: Lab, host: Host, interface: str) -> str:
    """The systemd-networkd configuration of a host."""
    return (
        f"[Match]\nName={interface}\n\n"
        f"[Link]\nMTUBytes={default_mtu()}\n\n"
        f"[Network]\nAddress={host.address}/24\nGateway={lab.gateway}\n"
        # Nobody advertises IPv6 routes here. Waiting for one takes 12 seconds, in which what asks
        # for network-online.target (nginx, caddy) doesn't start.
        "IPv6AcceptRA=no\n"
    )


def start(lab: Lab, host: Host) -> None:
    """Start a furnished host; it outlives this process."""
    _mount(host)
    command = [
        "systemd-nspawn",
        "--quiet",
        "--register=no",  # there may be no systemd-machined to register with,
        "--keep-unit",  # and no systemd to give it a unit
        "--settings=no",  # nothing from the machine's /etc/systemd/nspawn
        "--link-journal=no",
        "--timezone=off",
        "--directory=root",
        "--boot",
        f"--network-bridge={lab.bridge}",
        f"--machine={host.machine}",
        f"--hostname={host.name}",
        "--resolv-conf=off",
        "--system-call-filter=bpf",  # systemd inside needs it, and the capability,
        "--capability=CAP_BPF",  # for IPAddressDeny=
    ]
    process.launch(host, f"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 exec {shlex.join(command)}")


def poweroff(lab: Lab, host: Host) -> None:
    """Ask the host to shut down, without waiting for it."""
    process.ask_to_stop(host)  # nspawn hands a SIGTERM on to the host's init, as a wish to halt


def clean(host: Host) -> None:
    """Remove what an ended host left in the machine's kernel: its interface and its mount."""
    # Of a host that was killed, the interface stays for a moment: the next start needs its name.
    run("ip", "link", "delete", f"vb-{host.machine}", check=False)
    while mounted(host.root):
        run("umount", "--lazy", host.root)


def _mount(host: Host) -> None:
    """Mount the host's root: the shared base below, what the host changes above."""
    if mounted(host.root):
        return
    for directory in (host.dir / "upper", host.dir / "work", host.root):
        directory.mkdir(exist_ok=True)
        directory.chmod(0o755)
    layers = f"lowerdir={host.base}/root,upperdir={host.dir}/upper,workdir={host.dir}/work"
    run("mount", "-t", "overlay", f"nox-lab-{host.machine}", "-o", layers, host.root)
