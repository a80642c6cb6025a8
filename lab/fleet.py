"""The verbs of the lab: bring hosts up, end them, look at them, reboot one."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lab import base, inventory, machine, network, nspawn, process, ssh, uml
from lab.machine import run, say
from lab.state import (
    CACHE,
    STATE,
    Host,
    Lab,
    LabError,
    free_index,
    lab_names,
    load_lab,
    locked,
    start_time,
)

_TOOLS = {
    "ip": "iproute2",
    "iptables": "iptables",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
}
_POLL = 0.05  # seconds between two looks at a host that is coming or going


class Kind(Protocol):
    """What a kind of host must know to do; each is a module."""

    BOOT_BOUND: int  # seconds to ssh

    def prepare(self, suite: str) -> str: ...
    def furnish(self, lab: Lab, host: Host, files: dict[str, str]) -> None: ...
    def start(self, lab: Lab, host: Host) -> None: ...
    def poweroff(self, lab: Lab, host: Host) -> None: ...
    def clean(self, host: Host) -> None: ...


def _kind(name: str) -> Kind:
    return {"nspawn": nspawn, "uml": uml}[name]


def _wait(condition: Callable[[], bool], bound: float) -> bool:
    """Wait until the condition holds; False when it doesn't within ``bound`` seconds."""
    end = time.monotonic() + bound
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL)
    return True


# --- up ----------------------------------------------------------------------------------------------------------


def up(
    name: str,
    wanted: list[str],
    suite: str,
    kind: str,
    inventory_dir: Path | None,
    default_dir: Path,
) -> Lab:
    """Bring up the hosts called ``wanted``; those that run stay untouched, one that died is started again as it was.

    Raises LabError when a host doesn't answer on ssh in time; that host is removed, the others stay.
    """
    machine.need_tools(_TOOLS)
    with locked(name):
        _sweep()
        lab = _open_lab(name)
        directory = inventory_dir or Path(lab.inventory or default_dir)
        holder = inventory.owner(directory)
        if holder not in (None, name) and holder in lab_names():
            raise LabError(
                f"{directory} is the inventory of the lab {holder}, which exists; pass another with --inventory DIR, "
                f"or end that lab first: python3 -m lab down --lab {holder}"
            )
        if lab.inventory and lab.inventory != str(directory):
            inventory.remove(lab)
        lab.inventory = str(directory)
        missing = [
            host for host in wanted if host not in lab.hosts or not process.alive(lab.hosts[host])
        ]
        failures: list[str] = []
        if missing:
            failures = _start_all(lab, missing, suite, kind)
        lab.save()
        inventory.write(lab)
        if failures:
            raise LabError("\n".join(failures))
        extra = [host for host in lab.hosts if host not in wanted]
        if extra:
            say(f"{len(extra)} more in the lab {name} stay as they are: {' '.join(extra)}")
        return lab


def _open_lab(name: str) -> Lab:
    """The lab's record; a new lab gets a /24 that nothing on this machine uses."""
    lab = load_lab(name)
    if lab:
        return lab
    with locked("-network"):
        others = [load_lab(other) for other in lab_names()]
        lab = Lab(
            name,
            free_index(name, {other.index for other in others if other} | network.taken_indexes()),
        )
        lab.save()
        return lab


def _start_all(lab: Lab, names: list[str], suite: str, kind: str) -> list[str]:
    """Start hosts that don't run; returns a message for each that didn't come up, and removes it."""
    started = time.monotonic()
    again = [
        lab.hosts[name] for name in names if name in lab.hosts and _can_restart(lab.hosts[name])
    ]
    new = [name for name in names if name not in {host.name for host in again}]
    base_dir = ""
    if new:
        suite = machine.choose_suite(suite)
        base_dir = _kind(kind).prepare(suite)
    network.raise_network(lab)
    if not lab.key.exists():
        _generate_key(lab.key, f"nox-lab-{lab.name}")
    for name in new:
        if name in lab.hosts:
            _end([lab.hosts.pop(name)], lab)
        _refuse_double(lab, name)
        lab.hosts[name] = Host(name, lab.name, kind, suite, lab.free_address(), base_dir)
    lab.save()  # before anything is started: a crash from here on leaves nothing that no record names
    if again:
        say(
            f"starting again, with the disk as it was left: {' '.join(host.name for host in again)}"
        )
    if new:
        say(f"starting {len(new)} {suite} host{'s'[: len(new) > 1]} ({kind})")

    hosts = again + [lab.hosts[name] for name in new]

    def start(host: Host) -> None:
        if host in again:
            _kill(host)
        else:
            _furnish(lab, host)
        _kind(host.kind).start(lab, host)

    with ThreadPoolExecutor(max_workers=2 * (os.cpu_count() or 1)) as pool:
        list(pool.map(start, hosts))
    late = _wait_for_ssh(hosts)
    failures = []
    for host, cause in late.items():
        lines = host.console.read_text(errors="replace").splitlines()[-40:]
        failures.append(
            f"host {host.name} {cause}; the end of its console log:\n"
            + "\n".join(f"  | {line}" for line in lines)
        )
    _end(list(late), lab)
    for host in late:
        del lab.hosts[host.name]
    if not late:
        say(f"{len(hosts)} on ssh after {time.monotonic() - started:.1f} s")
    return failures


def _can_restart(host: Host) -> bool:
    """Whether a host that doesn't run has all that a start needs."""
    return (host.dir / "start").exists() and Path(host.base).exists()


def _refuse_double(lab: Lab, name: str) -> None:
    """Lab ``a``, host ``b-c`` and lab ``a-b``, host ``c`` would share a machine name."""
    for other in lab_names():
        for host in (STATE / other / "hosts").glob("*"):
            if other != lab.name and f"{other}-{host.name}" == f"{lab.name}-{name}":
                raise LabError(
                    f"the name {lab.name}-{name} is taken by host {host.name} of the lab {other}; choose another"
                )


def _generate_key(path: Path, comment: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", path)


def _furnish(lab: Lab, host: Host) -> None:
    key = host.dir / "ssh_host_ed25519_key"
    _generate_key(key, f"root@{host.name}")
    files = {
        "etc/hostname": f"{host.name}\n",
        "etc/hosts": f"127.0.0.1\tlocalhost\n127.0.1.1\t{host.name}\n\n::1\tlocalhost ip6-localhost ip6-loopback\n",
        "etc/machine-id": f"{uuid.uuid4().hex}\n",
        "etc/resolv.conf": machine.machine_resolver(),
        "etc/ssh/ssh_host_ed25519_key": key.read_text(),
        "etc/ssh/ssh_host_ed25519_key.pub": key.with_suffix(".pub").read_text(),
    }
    _kind(host.kind).furnish(lab, host, files)


def _wait_for_ssh(hosts: Iterable[Host]) -> dict[Host, str]:
    """Wait until every host sends its ssh banner; returns those that didn't, with the reason."""
    began = time.monotonic()
    pending = {host.address: host for host in hosts}
    late: dict[Host, str] = {}
    while pending:
        for address in ssh.answering(pending):
            del pending[address]
        elapsed = time.monotonic() - began
        for address, host in list(pending.items()):
            bound = _kind(host.kind).BOOT_BOUND
            cause = ""
            if not process.alive(host):
                cause = f"ended {elapsed:.1f} s after the start"
            elif elapsed > bound:
                cause = f"doesn't answer on ssh within {bound} s"
            if cause:
                late[pending.pop(address)] = cause
        time.sleep(_POLL)
    return late


# --- down --------------------------------------------------------------------------------------------------------


def down(name: str, names: list[str]) -> int:
    """End these hosts, or all; with the last one goes the lab: bridge, rules, keys, inventory. Returns how many ended.

    Raises LabError when the lab has no host of such a name.
    """
    with locked(name):
        try:
            lab = load_lab(name)
        except LabError as exc:
            say(str(exc))
            lab = None
        if lab is None:
            lab = Lab(name, -1)
        unknown = [host for host in names if host not in lab.hosts]
        if unknown:
            raise LabError(
                f"the lab {name} has no host {' '.join(unknown)}; it has: {' '.join(lab.hosts) or 'none'}"
            )
        # A directory without a record is what a crash left.
        targets = [lab.hosts[host] for host in names] if names else list(lab.hosts.values())
        if not names or set(names) == set(lab.hosts):
            targets += [
                Host(path.name, name, "nspawn", "", "", "")
                for path in sorted((lab.dir / "hosts").glob("*"))
                if path.name not in lab.hosts
            ]
        _end(targets, lab)
        for host in targets:
            lab.hosts.pop(host.name, None)
        if lab.hosts:
            lab.save()
            inventory.write(lab)
        else:
            if lab.index >= 0:
                network.lower_network(lab)
            inventory.remove(lab)
            lab.forget()
        _sweep()
        return len(targets)


def _end(hosts: list[Host], lab: Lab) -> None:
    """Power hosts off, all at once, kill what doesn't end in time, and remove all that is theirs."""
    running = [host for host in hosts if process.running(host)]
    for host in running:
        if process.alive(host):
            _kind(host.kind).poweroff(lab, host)
    _wait(lambda: not any(process.alive(host) for host in running), process.POWEROFF_BOUND)
    for host in hosts:
        _kill(host)
        base.remove_tree(host.dir)


def _kill(host: Host) -> None:
    """End whatever still runs of a host, and remove its traces in the kernel (not its disk)."""
    if process.running(host):
        process.ask_to_stop(host)
        process.kill_group(process.group_of(host))
        if not _wait(lambda: not process.running(host), 10):
            raise LabError(
                f"host {host.name} of the lab {host.lab} can't be killed; its processes: {process.group_of(host)}"
            )
    process.remove_group(process.group_of(host))
    _kind(host.kind).clean(host)


def _sweep() -> None:
    """Remove what no lab's record names any more: processes, bridges, rules. A crash or a hand can leave such."""
    with locked("-network"):
        labs = {name: load_lab_or_none(name) for name in lab_names()}
        machines = {
            f"{name}-{path.name}" for name in labs for path in (STATE / name / "hosts").glob("*")
        }
        for group in process.orphan_groups(machines):
            say(f"ending leftover processes: {group.name}")
            process.kill_group(group)
            _wait(lambda group=group: not process.populated(group), 10)  # type: ignore[misc]
            process.remove_group(group)
        network.sweep({lab.index: lab.name for lab in labs.values() if lab})


def load_lab_or_none(name: str) -> Lab | None:
    with suppress(LabError):
        return load_lab(name)
    return None


def purge() -> None:
    """Remove the cached bases no host stands on."""
    used = {
        host.base
        for name in lab_names()
        if (lab := load_lab_or_none(name))
        for host in lab.hosts.values()
    }
    kept = base.purge(used)
    if kept:
        say(
            f"kept, because hosts stand on them: {' '.join(kept)}; end the hosts first: python3 -m lab down --all"
        )
    say(f"the cache {CACHE} is {'smaller' if kept else 'gone'}")


# --- status, ssh, reboot -----------------------------------------------------------------------------------------


@dataclass
class Status:
    """One line of the table. ``memory`` in bytes, ``uptime`` in seconds since the host's process started."""

    lab: str
    host: str
    kind: str
    suite: str
    address: str
    state: str  # up, booting, dead, leftover
    pid: int | None
    memory: int
    uptime: float


def status(names: Iterable[str]) -> list[Status]:
    """Every host of these labs, and what a crash left of them."""
    rows = []
    for name in names:
        lab = load_lab_or_none(name)
        hosts = list(lab.hosts.values()) if lab else []
        banner = ssh.answering(host.address for host in hosts)
        for host in hosts:
            pid = process.main_pid(host)
            if pid:
                state = "up" if host.address in banner else "booting"
            else:
                state = "leftover" if process.populated(process.group_of(host)) else "dead"
            rows.append(
                Status(
                    name,
                    host.name,
                    host.kind,
                    host.suite,
                    host.address,
                    state,
                    pid,
                    process.memory(host),
                    _age(pid),
                )
            )
        known = {host.name for host in hosts}
        for path in sorted((STATE / name / "hosts").glob("*")):
            if path.name not in known:
                rows.append(Status(name, path.name, "", "", "", "leftover", None, 0, 0.0))
    return rows


def _age(pid: int | None) -> float:
    """Seconds since a process started; 0 when there is none."""
    began = start_time(pid) if pid else None
    if began is None:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK")


def find_host(lab_name: str, host_name: str) -> tuple[Lab, Host]:
    """Raises LabError when there is no such host."""
    lab = load_lab(lab_name)
    if lab is None:
        raise LabError(
            f"there is no lab {lab_name}; bring it up: python3 -m lab up --lab {lab_name}"
        )
    if host_name not in lab.hosts:
        raise LabError(
            f"the lab {lab_name} has no host {host_name}; it has: {' '.join(lab.hosts) or 'none'}"
        )
    return lab, lab.hosts[host_name]


def reboot(lab: Lab, host: Host) -> float:
    """Reboot a host and wait until ssh answers in a new boot; returns the seconds it took.

    Raises LabError when it doesn't come back in time.
    """
    began = time.monotonic()
    before = ssh.boot_id(lab, host)
    if not before:
        raise LabError(
            f"host {host.name} doesn't answer on ssh; start it again: python3 -m lab up --lab {lab.name}"
        )
    ssh.output(lab, host, "systemctl", "reboot")  # may end with a lost connection
    bound = _kind(host.kind).BOOT_BOUND

    def back() -> bool:
        return bool(ssh.answering([host.address])) and ssh.boot_id(lab, host) not in ("", before)

    if not _wait(back, bound):
        raise LabError(
            f"host {host.name} isn't back {bound} s after `systemctl reboot`; see: python3 -m lab console --lab {lab.name} {host.name}"
        )
    return time.monotonic() - began
