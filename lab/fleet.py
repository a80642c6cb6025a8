"""The verbs of the lab: bring hosts up, end them, look at them, reboot one."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from lab import base, inherited, inventory, network, nspawn, process, ssh, uml
from lab.machine import mounted, need_tools, run, say
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
_KILL_BOUND = 60  # seconds until a killed host is gone: fifty at once take their memory apart on two cores
# Of hosts that don't come up: how many console logs are shown, how many lines, and what of them
# would garble a terminal.
_CONSOLES = 3
_CONSOLE_LINES = 40
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\n\t\x20-\x7e\xa0-\uffff]")


class Kind(Protocol):
    """What a kind of host can do; each kind is a module."""

    BOOT_BOUND: int  # seconds to ssh

    def prepare(self, suite: str) -> str: ...
    def furnish(self, lab: Lab, host: Host, files: dict[str, str]) -> None: ...
    def start(self, lab: Lab, host: Host) -> None: ...
    def poweroff(self, lab: Lab, host: Host) -> None: ...
    def clean(self, host: Host) -> None: ...


def _kind(name: str) -> Kind:
    kinds: dict[str, Kind] = {"nspawn": nspawn, "uml": uml}
    return kinds[name]


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=4 * (os.cpu_count() or 1))


def _wait(condition: Callable[[], bool], bound: float) -> bool:
    """Wait for a condition; False when it doesn't hold within ``bound`` seconds."""
    end = time.monotonic() + bound
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL)
    return True


def _read_lab(name: str) -> Lab | None:
    """A lab's record; None when there is none, or an unreadable one."""
    with suppress(LabError):
        return load_lab(name)
    return None


# --- up ---


@dataclass(frozen=True)
class Wanted:
    """What ``up`` is asked for. ``inventory`` None: where the lab's is, or at the default."""

    hosts: list[str]
    suite: str
    kind: str
    inventory: Path | None
    default_inventory: Path


def up(name: str, wanted: Wanted) -> Lab:
    """Bring up hosts: those that run stay untouched, one that died is started again as it was.

    Raises LabError when a host doesn't come up in time; it is removed, the others stay.
    """
    need_tools(_TOOLS)
    _find_room()
    with locked(name):
        _sweep()
        lab = _open_lab(name)
        try:
            _place_inventory(lab, wanted)
            _end(lab, lab.strays())
            failures = _bring_up(lab, wanted)
            lab.save()
            inventory.write(lab)
        finally:
            if not lab.hosts:
                _close_lab(lab)
    if failures:
        raise LabError("\n".join(failures))
    others = [host for host in lab.hosts if host not in wanted.hosts]
    if others:
        say(f"{len(others)} more in the lab {name} stay as they are: {' '.join(others)}")
    return lab


def _find_room() -> None:
    """Keep all state in memory where the disk is an overlay, as in a container: none can stand on
    one."""
    STATE.mkdir(parents=True, exist_ok=True)
    if run("stat", "--file-system", "--format=%T", STATE).strip() == "overlayfs":
        say(f"{STATE} is on an overlay, so hosts' disks are kept in memory")
        run("mount", "-t", "tmpfs", "-o", "mode=755", "nox-lab", STATE)


def _leave_room() -> None:
    """When the last lab is gone: unmount what was mounted for all."""
    if not lab_names():
        process.leave_hierarchy()
        if mounted(STATE) == "nox-lab":
            run("umount", "--lazy", STATE)


def _open_lab(name: str) -> Lab:
    """The lab's record; a new lab gets a /24 that nothing on this machine uses."""
    lab = load_lab(name)
    if lab is None:
        with locked("-network"):
            labs = [_read_lab(other) for other in lab_names()]
            taken = {other.index for other in labs if other} | network.taken_indexes()
            lab = Lab(name, free_index(name, taken))
            lab.save()
    return lab


def _close_lab(lab: Lab) -> None:
    """Remove all that is the lab's and no host's."""
    network.lower_network(lab)
    inventory.remove(lab)
    lab.forget()


def _place_inventory(lab: Lab, wanted: Wanted) -> None:
    """Decide where the lab's inventory goes.

    Raises LabError when another lab's is there, whose hosts would no longer be found.
    """
    directory = wanted.inventory or Path(lab.inventory or wanted.default_inventory)
    holder = inventory.owner(directory)
    if holder not in (None, lab.name) and holder in lab_names():
        raise LabError(
            f"{directory} holds the inventory of the lab {holder}; "
            f"choose another with --inventory, or end that lab: python3 -m lab down --lab {holder}"
        )
    if lab.inventory != str(directory):
        inventory.remove(lab)
        lab.inventory = str(directory)


def _bring_up(lab: Lab, wanted: Wanted) -> list[str]:
    """Get every wanted host to answer on ssh; returns a message for each that doesn't."""
    began = time.monotonic()
    network.raise_network(lab)
    known = [lab.hosts[name] for name in wanted.hosts if name in lab.hosts]
    ready = ssh.answering(host.address for host in known)
    booting = [host for host in known if process.alive(host) and host.address not in ready]
    dead = [host for host in known if not process.alive(host)]
    again = [host for host in dead if (host.dir / "start").exists() and Path(host.base).exists()]
    broken = [host for host in dead if host not in again]
    names = [name for name in wanted.hosts if lab.hosts.get(name) in (None, *broken)]
    new = _create(lab, names, broken, wanted) if names else []
    if again:
        say(f"starting again, with the disk it had: {' '.join(host.name for host in again)}")
    if new:
        suite = new[0].suite
        say(f"starting {len(new)} {suite} host{'s' if len(new) > 1 else ''} ({wanted.kind})")
    late = _start(lab, again, new)
    late |= _wait_for_ssh([host for host in booting + again + new if host not in late])
    failures = _failures(late)
    # What has run before may hold something of worth: only a new host is removed.
    _end(lab, [host for host in new if host in late])
    for host in [host for host in new if host in late]:
        del lab.hosts[host.name]
    for host in [host for host in again if host in late]:
        _kill(host)
    if (booting or again or new) and not late:
        count = len(booting + again + new)
        say(f"{count} on ssh after {time.monotonic() - began:.1f} s")
    return failures


def _create(lab: Lab, names: list[str], broken: list[Host], wanted: Wanted) -> list[Host]:
    """Enter new hosts into the lab's record, in place of the broken ones."""
    suite = inherited.choose_suite(wanted.suite)
    place = _kind(wanted.kind).prepare(suite)
    base.drop_expired(_used_bases() | {place})
    for name in names:
        _refuse_double(lab, name)
    _end(lab, broken)
    for host in broken:
        del lab.hosts[host.name]
    if not lab.key.exists():
        _generate_key(lab.key, f"nox-lab-{lab.name}")
    for name in names:
        lab.hosts[name] = Host(name, lab.name, wanted.kind, suite, lab.free_address(), place)
    lab.save()  # before any is started: whatever happens then, a record names what it leaves
    return [lab.hosts[name] for name in names]


def _refuse_double(lab: Lab, name: str) -> None:
    """Lab ``a`` with host ``b-c`` and lab ``a-b`` with host ``c`` would be one machine name."""
    for other in lab_names():
        for path in (STATE / other / "hosts").glob("*"):
            if other != lab.name and f"{other}-{path.name}" == f"{lab.name}-{name}":
                raise LabError(
                    f"{lab.name}-{name} is also the host {path.name} of the lab {other}; choose another name"
                )


def _generate_key(path: Path, comment: str) -> None:
    """Write an ssh key pair: ``path`` (mode 0600) and ``path``.pub."""
    path.unlink(missing_ok=True)
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", path)


def _start(lab: Lab, again: list[Host], new: list[Host]) -> dict[Host, str]:
    """Start hosts, all at once; returns those that can't be, with the cause."""

    def start(host: Host) -> str:
        try:
            if host in new:
                _furnish(lab, host)
            else:
                _kill(host)
            _kind(host.kind).start(lab, host)
        except LabError as exc:
            return f"can't be started: {exc}"
        return ""

    hosts = again + new
    with _pool() as pool:
        causes = dict(zip(hosts, pool.map(start, hosts), strict=True))
    return {host: cause for host, cause in causes.items() if cause}


def _furnish(lab: Lab, host: Host) -> None:
    """Make a new host's disk."""
    host.dir.mkdir(parents=True, exist_ok=True)
    host.dir.chmod(0o700)  # its keys are in there
    key = host.dir / "ssh_host_ed25519_key"
    _generate_key(key, f"root@{host.name}")
    files = {
        **inherited.files(),
        "etc/hostname": f"{host.name}\n",
        "etc/hosts": f"127.0.0.1\tlocalhost\n127.0.1.1\t{host.name}\n::1\tlocalhost ip6-localhost ip6-loopback\n",
        "etc/machine-id": f"{uuid.uuid4().hex}\n",
        "etc/ssh/ssh_host_ed25519_key": key.read_text(),
        "etc/ssh/ssh_host_ed25519_key.pub": key.with_suffix(".pub").read_text(),
    }
    _kind(host.kind).furnish(lab, host, files)


def _wait_for_ssh(hosts: list[Host]) -> dict[Host, str]:
    """Wait until each host sends its ssh banner; returns those that don't, with the cause."""
    began = time.monotonic()
    pending = {host.address: host for host in hosts}
    late: dict[Host, str] = {}
    while pending:
        for address in ssh.answering(pending):
            del pending[address]
        elapsed = time.monotonic() - began
        for address, host in list(pending.items()):
            bound = _kind(host.kind).BOOT_BOUND
            if not process.alive(host):
                late[pending.pop(address)] = f"ended {elapsed:.1f} s after its start"
            elif max(elapsed, _uptime(host)) > bound:
                late[pending.pop(address)] = f"doesn't answer on ssh after {bound} s"
        time.sleep(_POLL)
    return late


def _failures(late: dict[Host, str]) -> list[str]:
    """What is to be said of hosts that didn't come up: all causes, a few console logs."""
    messages = []
    for number, (host, cause) in enumerate(late.items()):
        message = f"the host {host.name} of the lab {host.lab} {cause}"
        if number < _CONSOLES and host.console.exists():
            text = _CONTROL.sub("", host.console.read_text(errors="replace"))
            lines = [line for line in text.splitlines() if line.strip()][-_CONSOLE_LINES:]
            message = "\n  | ".join([f"{message}; its console log ends:", *lines])
        messages.append(message)
    return messages


# --- down ---


def down(name: str, names: list[str]) -> int:
    """End these hosts, or all; with the last one goes the lab. Returns how many hosts ended.

    Raises LabError when the lab has no host of such a name.
    """
    with locked(name):
        lab = _read_lab(name) or Lab(name, network.index_of(name))
        unknown = [host for host in names if host not in lab.hosts]
        if unknown:
            have = " ".join(lab.hosts) or "none"
            raise LabError(f"the lab {name} has no host {' '.join(unknown)}; it has: {have}")
        targets = [lab.hosts[host] for host in names or lab.hosts] + lab.strays()
        _end(lab, targets)
        for host in targets:
            lab.hosts.pop(host.name, None)
        if lab.hosts:
            lab.save()
            inventory.write(lab)
        else:
            _close_lab(lab)
        _sweep()
        _leave_room()
    return len(targets)


def _end(lab: Lab, hosts: list[Host]) -> None:
    """Power hosts off, all at once, kill those that don't end, and remove all that is theirs."""

    def remove(host: Host) -> None:
        _kill(host)
        base.remove_tree(host.dir)

    running = [host for host in hosts if process.alive(host)]
    for host in running:
        _kind(host.kind).poweroff(lab, host)
    _wait(lambda: not any(process.alive(host) for host in running), process.POWEROFF_BOUND)
    with _pool() as pool:
        list(pool.map(remove, hosts))


def _kill(host: Host) -> None:
    """End whatever still runs of a host, and remove what it left in the kernel; not its disk."""
    group = process.group_of(host)
    if process.running(host):
        process.ask_to_stop(host)
        process.kill_group(group)
        if not _wait(lambda: not process.running(host), _KILL_BOUND):
            raise LabError(f"the host {host.name} can't be killed; its processes are in {group}")
    process.remove_group(group)
    _kind(host.kind).clean(host)


def _empty(group: Path) -> bool:
    return not process.populated(group)


def _sweep() -> None:
    """Remove what no lab's record names any more: processes, bridges, rules."""
    with locked("-network"):
        labs = lab_names()
        machines = {f"{name}-{path.name}" for name in labs for path in (STATE / name / "hosts").glob("*")}
        for group in process.orphan_groups(machines):
            say(f"ending leftover processes: {group.name}")
            process.kill_group(group)
            _wait(partial(_empty, group), 10)
            process.remove_group(group)
        network.sweep(set(labs))


def _used_bases() -> set[str]:
    labs = [_read_lab(name) for name in lab_names()]
    return {host.base for lab in labs if lab for host in lab.hosts.values()}


def purge() -> None:
    """Remove the caches that no host stands on."""
    kept = base.purge(_used_bases())
    if kept:
        say(f"kept, as hosts stand on it: {' '.join(kept)}; end them: python3 -m lab down --all")
    else:
        say(f"{CACHE} is gone")


# --- status, reboot ---


@dataclass(frozen=True)
class Status:
    """A host as it is now. ``memory`` in bytes, ``uptime`` in seconds since its process started.

    ``state`` is ``up`` (ssh answers), ``booting``, ``dead`` (nothing runs), or ``leftover`` (it
    lacks its main process, or a record).
    """

    lab: str
    host: str
    kind: str
    suite: str
    address: str
    state: str
    pid: int | None
    memory: int
    uptime: float


def status(names: Iterable[str]) -> list[Status]:
    """Every host of these labs, and what a crash left of them."""
    found = []
    for name in names:
        lab = _read_lab(name) or Lab(name, 0)
        answering = ssh.answering((host.address for host in lab.hosts.values()), timeout=1)
        for host in lab.hosts.values():
            pid = process.main_pid(host)
            if pid:
                state = "up" if host.address in answering else "booting"
            else:
                state = "leftover" if process.running(host) else "dead"
            found.append(_status(host, state, pid))
        found += [_status(host, "leftover", None) for host in lab.strays()]
    return found


def _status(host: Host, state: str, pid: int | None) -> Status:
    return Status(
        lab=host.lab,
        host=host.name,
        kind=host.kind,
        suite=host.suite,
        address=host.address,
        state=state,
        pid=pid,
        memory=process.memory(host),
        uptime=round(_uptime(host), 1),
    )


def _uptime(host: Host) -> float:
    """Seconds since the host's main process started; 0 when there is none."""
    pid = process.main_pid(host)
    began = start_time(pid) if pid else None
    if began is None:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK")


def find_host(lab_name: str, host_name: str) -> tuple[Lab, Host]:
    """Raises LabError when there is no such host."""
    lab = load_lab(lab_name)
    if lab is None:
        have = " ".join(lab_names()) or "none"
        raise LabError(f"there is no lab {lab_name}; there is: {have}")
    if host_name not in lab.hosts:
        have = " ".join(lab.hosts) or "none"
        raise LabError(f"the lab {lab_name} has no host {host_name}; it has: {have}")
    return lab, lab.hosts[host_name]


def reboot(lab: Lab, host: Host) -> float:
    """Reboot a host and wait until ssh answers in a new boot; returns the seconds it took.

    Raises LabError when it isn't back in time.
    """
    began = time.monotonic()
    before = ssh.boot_id(lab, host)
    if not before:
        raise LabError(f"{host.name} doesn't answer on ssh; see: python3 -m lab status")
    ssh.output(lab, host, "systemctl", "reboot")  # ends with the connection, or before it

    def back() -> bool:
        return bool(ssh.answering([host.address])) and ssh.boot_id(lab, host) not in ("", before)

    bound = _kind(host.kind).BOOT_BOUND
    if not _wait(back, bound):
        see = f"python3 -m lab console --lab {lab.name} {host.name}"
        raise LabError(f"{host.name} isn't back {bound} s after `systemctl reboot`; see: {see}")
    return time.monotonic() - began
