"""The bridge of a lab, its way out (NAT), and what the kernel must allow for many hosts."""

from __future__ import annotations

import ipaddress
import json
import re
import shlex
from pathlib import Path

from lab.machine import default_mtu, run, say
from lab.state import Lab, bridge_name

_MARK = "nox-lab:"  # and the lab's name: the comment of each of its iptables rules
_INOTIFY = Path("/proc/sys/fs/inotify/max_user_instances")
_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")


def allow_many_hosts() -> None:
    """systemd takes about ten inotify instances per host, all on root's account: 128 end at a dozen hosts, quietly."""
    if int(_INOTIFY.read_text()) < 8192:
        _INOTIFY.write_text("8192")
    if _FORWARD.read_text().strip() != "1":
        _FORWARD.write_text("1")


def _rules(lab: Lab) -> list[tuple[str, str, list[str]]]:
    """(table, chain, match and target) of every rule of a lab. The FORWARD ones matter where a container engine or a
    firewall on the machine drops what it doesn't know."""
    mark = ["-m", "comment", "--comment", f"{_MARK}{lab.name}"]
    return [
        (
            "nat",
            "POSTROUTING",
            ["-s", lab.subnet, "!", "-o", lab.bridge, *mark, "-j", "MASQUERADE"],
        ),
        ("filter", "FORWARD", ["-i", lab.bridge, *mark, "-j", "ACCEPT"]),
        ("filter", "FORWARD", ["-o", lab.bridge, *mark, "-j", "ACCEPT"]),
    ]


def raise_network(lab: Lab) -> None:
    """Bring up the lab's bridge and NAT; nothing changes when they are up."""
    allow_many_hosts()
    if not Path(f"/sys/class/net/{lab.bridge}").exists():
        run("ip", "link", "add", lab.bridge, "type", "bridge")
    run("ip", "link", "set", lab.bridge, "mtu", str(default_mtu()), "up")
    run("ip", "address", "replace", f"{lab.gateway}/24", "dev", lab.bridge)
    # Ask for a booting host's hardware address 20 times a second, not once: its ssh is seen the moment it is there.
    Path(f"/proc/sys/net/ipv4/neigh/{lab.bridge}/retrans_time_ms").write_text("50")
    present = _marked_rules(f"{_MARK}{lab.name}")
    if len(present) != len(_rules(lab)):
        _drop_rules(f"{_MARK}{lab.name}")
        for table, chain, rule in _rules(lab):
            run("iptables", "-w", "-t", table, "-I", chain, *rule)


def lower_network(lab: Lab) -> None:
    """Remove the lab's bridge, what is still plugged into it, and its rules."""
    _drop_rules(f"{_MARK}{lab.name}")
    _delete_bridge(lab.bridge)


def _delete_bridge(bridge: str) -> None:
    for port in Path(f"/sys/class/net/{bridge}/brif").glob("*"):
        run("ip", "link", "delete", port.name, check=False)
    if Path(f"/sys/class/net/{bridge}").exists():
        run("ip", "link", "delete", bridge)


def sweep(labs: dict[int, str]) -> None:
    """Remove bridges and rules of labs that aren't among these (index -> name)."""
    bridges = {bridge_name(index) for index in labs}
    for link in Path("/sys/class/net").glob("br-nox*"):
        if re.fullmatch(r"br-nox\d*", link.name) and link.name not in bridges:
            say(f"removing the leftover bridge {link.name}")
            _delete_bridge(link.name)
    for _, words in _marked_rules():
        mark = next(word for word in words if word.startswith(_MARK))
        if mark.removeprefix(_MARK) not in labs.values():
            _drop_rules(mark)


def _marked_rules(mark: str | None = None) -> list[tuple[str, list[str]]]:
    """(table, words of the rule as `iptables -S` prints it) of the rules with this mark, or with any lab's."""
    found = []
    for table in ("nat", "filter"):
        for line in run("iptables", "-w", "-t", table, "-S").splitlines():
            words = shlex.split(line)
            if mark in words or (mark is None and any(word.startswith(_MARK) for word in words)):
                found.append((table, words))
    return found


def _drop_rules(mark: str) -> None:
    for table, words in _marked_rules(mark):
        run("iptables", "-w", "-t", table, "-D", *words[1:])


def taken_indexes() -> set[int]:
    """The K of every 10.77.K.0/24 that an address or route of this machine touches, whoever set it up."""
    networks = [
        ipaddress.ip_network(f"{address['local']}/{address['prefixlen']}", strict=False)
        for link in json.loads(run("ip", "-json", "-4", "address") or "[]")
        for address in link.get("addr_info", [])
    ]
    for route in json.loads(run("ip", "-json", "-4", "route") or "[]"):
        if re.match(r"\d", route["dst"]):
            networks.append(ipaddress.ip_network(route["dst"]))
    ours = ipaddress.ip_network("10.77.0.0/16")
    return {
        index
        for index, subnet in enumerate(ours.subnets(new_prefix=24))
        if any(network.overlaps(subnet) and network.prefixlen >= 16 for network in networks)
    }
