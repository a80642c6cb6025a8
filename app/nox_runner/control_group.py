"""A control group (cgroup v2) for each run, where the unit has a delegated subtree.

The runner's own group may then hold groups, but no processes; so the runner moves to a leaf. What
the kernel really takes is looked at: a container may show files of controllers it does not have.
"""

from __future__ import annotations

import os
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass

from nox_runner.limits import Limits

_OWN_LEAF = "supervisor"
_PREFIX = "run-"
_CONTROLLERS = {"cpu": "cpu.max", "memory": "memory.max", "pids": "pids.max"}
NO_CPU_SHARE = "a run may use every core, and with more processes it gets more of them than others"
_PERIOD = 100_000  # µs, of cpu.max
_OWN_WEIGHT = 1000
"""Beside the 100 of each run: the runner's own work, which all runs wait for, comes first."""
_REMOVE_SECONDS = 5.0


class NotDelegatedError(Exception):
    """There is no subtree to make groups in; the message says why."""


@dataclass(frozen=True)
class Group:
    """One run's group."""

    path: str

    def add(self, pid: int) -> None:
        """Move the process `pid`, with its later children. OSError if the kernel refuses."""
        _write(f"{self.path}/cgroup.procs", str(pid))

    def kill(self) -> None:
        """Kill every process in it (Linux 5.14)."""
        with suppress(OSError):
            _write(f"{self.path}/cgroup.kill", "1")

    def cpu_ms(self) -> int:
        """CPU time that its processes have used, dead ones included; 0 if unknown."""
        return _field(f"{self.path}/cpu.stat", "usage_usec") // 1000

    def peak(self) -> int:
        """Most bytes of memory it had at a time (Linux 5.19); 0 if unknown."""
        try:
            return int(_read(f"{self.path}/memory.peak"))
        except (OSError, ValueError):
            return 0

    def out_of_memory(self) -> bool:
        """Whether the kernel killed one of its processes for memory."""
        return _field(f"{self.path}/memory.events", "oom_kill") > 0

    def remove(self) -> bool:
        """Remove it; False while the kernel has not let go of its last process yet."""
        try:
            os.rmdir(self.path)
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def end(self) -> None:
        """Kill what is left, and remove it; what cannot be removed, the next start clears away."""
        self.kill()
        deadline = time.monotonic() + _REMOVE_SECONDS
        while not self.remove() and time.monotonic() < deadline:
            time.sleep(0.005)


class Groups:
    """Makes groups below the runner's own."""

    def __init__(self, root: str, controllers: frozenset[str]) -> None:
        self._root = root
        self.controllers = controllers

    def make(self, limits: Limits) -> Group:
        """A group with the limits of a run. OSError if it cannot be made."""
        group = Group(f"{self._root}/{_PREFIX}{secrets.token_hex(8)}")
        os.mkdir(group.path)
        try:
            self.limit(group, limits)
        except BaseException:
            os.rmdir(group.path)
            raise
        return group

    def limit(self, group: Group, limits: Limits) -> None:
        """Set the limits of a run. Of the cores each has an equal share by itself."""
        if "cpu" in self.controllers and limits.cpus:
            _write(f"{group.path}/cpu.max", f"{round(limits.cpus * _PERIOD)} {_PERIOD}")
        if "memory" in self.controllers:
            _write(f"{group.path}/memory.max", str(limits.memory))
            with suppress(FileNotFoundError):  # a kernel without swap
                _write(f"{group.path}/memory.swap.max", "0")
        if "pids" in self.controllers:
            # The init of the sandbox is not the program's.
            _write(f"{group.path}/pids.max", str(limits.processes + 2))

    def enforced(self, limits: Limits) -> dict[str, str]:
        """By name the limits that hold by these groups, and how."""
        enforced = {}
        if "memory" in self.controllers:
            enforced["memory_per_run"] = f"{limits.memory} bytes, memory.max, no swap"
        if "pids" in self.controllers:
            enforced["processes_per_run"] = f"{limits.processes}, pids.max"
        if "cpu" in self.controllers:
            most = f", at most {limits.cpus:g} cores, cpu.max" if limits.cpus else ""
            enforced["cpu_share"] = f"the same for each run, cpu.weight{most}"
        return enforced

    def not_enforced(self) -> dict[str, str]:
        """By name the limits that they could hold but do not, and why."""
        missing = {}
        if "memory" not in self.controllers:
            missing["memory_per_run"] = "the unit's control group has no memory controller"
        if "cpu" not in self.controllers:
            missing["cpu_share"] = NO_CPU_SHARE
        return missing


def missing(why: str) -> dict[str, str]:
    """By name the limits that nothing holds where there are no groups, `why`."""
    return {"memory_per_run": why, "cpu_share": NO_CPU_SHARE}


def delegated() -> Groups:
    """Take over the own group's subtree. NotDelegatedError if there is none to be had."""
    try:
        root = _own_group()
        if not os.access(root, os.W_OK) or not os.access(f"{root}/cgroup.procs", os.W_OK):
            raise NotDelegatedError("the unit's control group is not delegated (Delegate=)")
        if os.path.basename(root) != _OWN_LEAF:
            os.makedirs(f"{root}/{_OWN_LEAF}", exist_ok=True)
            for pid in _read(f"{root}/cgroup.procs").split():
                _write(f"{root}/{_OWN_LEAF}/cgroup.procs", pid)
        else:
            root = os.path.dirname(root)
        for name in os.listdir(root):
            if name.startswith(_PREFIX):
                Group(f"{root}/{name}").end()
        controllers = _enable(root)
        if "cpu" in controllers:
            _write(f"{root}/{_OWN_LEAF}/cpu.weight", str(_OWN_WEIGHT))
        if not controllers:
            # A group that limits nothing is not worth the time it takes to move processes there.
            raise NotDelegatedError("the unit's control group has no controllers to limit with")
        return Groups(root, controllers)
    except OSError as error:
        raise NotDelegatedError(f"no control group per run: {error}") from None


def _enable(root: str) -> frozenset[str]:
    available = _read(f"{root}/cgroup.controllers").split()
    for name in _CONTROLLERS:
        if name in available:
            with suppress(OSError):
                _write(f"{root}/cgroup.subtree_control", f"+{name}")
    trial = f"{root}/{_PREFIX}trial"
    os.makedirs(trial, exist_ok=True)
    try:
        taken = set(_read(f"{trial}/cgroup.controllers").split())
        return frozenset(
            name for name, file in _CONTROLLERS.items()
            if name in taken and os.access(f"{trial}/{file}", os.W_OK)
        )  # fmt: skip
    finally:
        os.rmdir(trial)


def _own_group() -> str:
    place = next(
        (line[3:] for line in _read("/proc/self/cgroup").splitlines() if line.startswith("0::")),
        None,
    )
    mount = next(
        (
            fields[4]
            for fields in map(str.split, _read("/proc/self/mountinfo").splitlines())
            if fields[fields.index("-") + 1] == "cgroup2"
        ),
        None,
    )
    if place is None or mount is None:
        raise NotDelegatedError("this host has no control groups of version 2")
    if place == "/" or "/.." in place:
        raise NotDelegatedError("the runner is in no control group of its own")
    return mount + place


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _field(path: str, name: str) -> int:
    try:
        for line in _read(path).splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    except (OSError, ValueError):
        return 0
    return 0
