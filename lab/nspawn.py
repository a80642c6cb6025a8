"""Hosts as systemd-nspawn containers, each on an overlay over a shared base."""

from __future__ import annotations

import shlex
from pathlib import Path

from lab import base, process
from lab.machine import default_mtu, need_tools, run
from lab.state import Host, Lab, LabError

TOOLS = {"systemd-nspawn": "systemd-container"}
BOOT_BOUND = 90  # seconds to ssh, also for a hundred hosts on two cores


def prepare(suite: str) -> str:
    """Install what the machine lacks, build the base if need be; returns the base's directory."""
    need_tools(TOOLS)
    return str(base.base_for(base.recipe(suite, "nspawn")))


def is_mounted(path: Path) -> bool:
    return any(
        line.split()[4] == str(path)
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
    )


def mount(host: Host) -> None:
    """Mount the host's file system: the shared base below, the host's own changes above."""
    if is_mounted(host.root):
        return
    for directory in (host.root, host.dir / "upper", host.dir / "work"):
        directory.mkdir(parents=True, exist_ok=True)
    host.root.chmod(0o755)
    layers = f"lowerdir={host.base}/root,upperdir={host.dir}/upper,workdir={host.dir}/work"
    try:
        run("mount", "-t", "overlay", f"nox-lab-{host.machine}", "-o", layers, host.root)
    except LabError as exc:
        raise LabError(
            f"{exc}\nIf {host.dir} is on an overlay itself (a container's disk), mount a tmpfs or a disk there."
        ) from exc


def furnish(lab: Lab, host: Host, files: dict[str, str]) -> None:
    """Make a new host's file system: hostname, keys, network, resolver."""
    mount(host)
    network = (
        "[Match]\nName=host0\n\n"
        f"[Link]\nMTUBytes={default_mtu()}\n\n"
        f"[Network]\nAddress={host.address}/24\nGateway={lab.gateway}\nIPv6AcceptRA=no\n"
    )
    # must sort before systemd's own 80-container-host0.network, which asks DHCP
    files = {**files, "etc/systemd/network/10-host0.network": network}
    base.write_files(host.root, base.host_files(files, lab.key.with_suffix(".pub").read_text()))


def start(lab: Lab, host: Host) -> None:
    """Start a furnished host; it outlives this process."""
    mount(host)
    nspawn = [
        "systemd-nspawn",
        "--quiet",
        "--register=no",  # there may be no machined, nor a bus
        "--keep-unit",
        "--settings=no",  # no *.nspawn file of the machine
        "--link-journal=no",
        "--timezone=off",
        "--directory=root",
        "--boot",
        f"--network-bridge={lab.bridge}",
        f"--machine={host.machine}",
        f"--hostname={host.name}",
        "--resolv-conf=off",
        "--system-call-filter=bpf",  # systemd inside needs both for IPAddressDeny=
        "--capability=CAP_BPF",
    ]
    process.launch(host, f"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 exec {shlex.join(nspawn)}")


def unmount(host: Host) -> None:
    """Unmount the host's file system, if it is mounted."""
    while is_mounted(host.root):
        run("umount", "--lazy", host.root)


def poweroff(lab: Lab, host: Host) -> None:
    """Ask the host to shut down; nspawn passes SIGTERM on to its init as a request to halt."""
    process.ask_to_stop(host)


def clean(host: Host) -> None:
    """Remove what an ended host left in the machine's kernel: its network interface and its mount."""
    run(
        "ip", "link", "delete", f"vb-{host.machine}", check=False
    )  # stays for a moment with a killed host's namespace
    unmount(host)
