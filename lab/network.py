"""The bridge of a lab, its way out (NAT), and what the kernel must allow for many hosts."""

from __future__ import annotations

import ipaddress
import json
import re
import shlex
import shutil
from pathlib import Path

from lab.machine import default_mtu, run, say
from lab.state import Lab, bridge_name

# With the lab's name behind it: the comment of its iptables rules, and its bridge's alias.
_MARK = "nox-lab:"
_INTERFACES = Path("/sys/class/net")


def _allow_many_hosts() -> None:
    # A systemd takes about ten inotify instances, all on root's account here: of the usual 128,
    # a dozen hosts leave none, and further ones fail quietly.
    instances = Path("/proc/sys/fs/inotify/max_user_instances")
    if int(instances.read_text()) < 8192:
        instances.write_text("8192")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def _rules(lab: Lab) -> list[tuple[str, str, list[str]]]:
    """(table, chain, rule) of every iptables rule of a lab."""
    mark = ["-m", "comment", "--comment", f"{_MARK}{lab.name}"]
    return [
        (
            "nat",
            "POSTROUTING",
            ["-s", lab.subnet, "!", "-o", lab.bridge, *mark, "-j", "MASQUERADE"],
        ),
        # for machines whose container engine or firewall drops what it doesn't know
        ("filter", "FORWARD", ["-i", lab.bridge, *mark, "-j", "ACCEPT"]),
        ("filter", "FORWARD", ["-o", lab.bridge, *mark, "-j", "ACCEPT"]),
    ]


def raise_network(lab: Lab) -> None:
    """Bring up the lab's bridge and NAT; where they are up, nothing changes."""
    _allow_many_hosts()
    if not (_INTERFACES / lab.bridge).exists():
        run("ip", "link", "add", lab.bridge, "type", "bridge")
    run("ip", "link", "set", lab.bridge, "alias", f"{_MARK}{lab.name}")
    run("ip", "link", "set", lab.bridge, "mtu", str(default_mtu()), "up")
    run("ip", "address", "replace", f"{lab.gateway}/24", "dev", lab.bridge)
    # Ask for a booting host's hardware address 20 times a second instead of once.
    Path(f"/proc/sys/net/ipv4/neigh/{lab.bridge}/retrans_time_ms").write_text("50")
    if len(_present(f"{_MARK}{lab.name}")) != len(_rules(lab)):
        _drop_rules(f"{_MARK}{lab.name}")
        for table, chain, rule in _rules(lab):
            run("iptables", "-w", "-t", table, "-I", chain, *rule)


def lower_network(lab: Lab) -> None:
    """Remove the lab's bridge, what is still plugged into it, and its rules."""
    _drop_rules(f"{_MARK}{lab.name}")
    _delete_bridge(lab.bridge)


def _delete_bridge(bridge: str) -> None:
    for port in (_INTERFACES / bridge / "brif").glob("*"):
        run("ip", "link", "delete", port.name, check=False)
    if (_INTERFACES / bridge).exists():
        run("ip", "link", "delete", bridge)


def sweep(labs: set[str]) -> None:
    """Remove bridges and rules that bear the mark of a lab which isn't among these."""
    for alias in _INTERFACES.glob("br-nox*/ifalias"):
        mark = alias.read_text().strip()
        if mark.startswith(_MARK) and mark.removeprefix(_MARK) not in labs:
            say(f"removing the leftover bridge {alias.parent.name}")
            _delete_bridge(alias.parent.name)
    for mark in {mark for _, mark, _ in _present() if mark.removeprefix(_MARK) not in labs}:
        _drop_rules(mark)


def index_of(name: str) -> int:
    """The index of a lab's bridge, for when its record is lost; an unused one without a bridge."""
    for alias in _INTERFACES.glob("br-nox*/ifalias"):
        if alias.read_text().strip() == f"{_MARK}{name}":
            return int(alias.parent.name.removeprefix("br-nox") or 0)
    return 255


def _present(wanted: str | None = None) -> list[tuple[str, str, list[str]]]:
    """(table, mark, rule as `iptables -S` has it) of the rules with this mark, or with any."""
    found: list[tuple[str, str, list[str]]] = []
    if not shutil.which("iptables"):
        return found  # no lab was ever up here: `lab up` installs it
    for table in ("nat", "filter"):
        for line in run("iptables", "-w", "-t", table, "-S").splitlines():
            words = shlex.split(line)
            mark = next((word for word in words if word.startswith(_MARK)), None)
            if mark and wanted in (None, mark):
                found.append((table, mark, words))
    return found


def _drop_rules(mark: str) -> None:
    for table, _, words in _present(mark):
        run("iptables", "-w", "-t", table, "-D", *words[1:])


def taken_indexes() -> set[int]:
    """The K of every 10.77.K.0/24 and br-noxK that something on this machine uses."""
    lines = json.loads(run("ip", "-json", "-4", "route", "show", "table", "all") or "[]")
    routes = {route["dst"] for route in lines if re.match(r"\d", route["dst"])}
    networks = [ipaddress.ip_network(route) for route in routes]
    # A route wider than all of ours is somebody's whole 10.0.0.0/8, and ours may be in there.
    narrow = [network for network in networks if network.prefixlen >= 16]
    return {
        index
        for index in range(256)
        if (_INTERFACES / bridge_name(index)).exists()
        or any(network.overlaps(ipaddress.ip_network(f"10.77.{index}.0/24")) for network in narrow)
    }
