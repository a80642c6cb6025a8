"""The limits of one run, and the resource limits that carry them."""

from __future__ import annotations

import math
import os
import resource
from contextlib import suppress
from dataclasses import dataclass

from nox_runner.settings import Settings

_OPEN_FILES = 1024
_PENDING_SIGNALS = 4096
_MESSAGE_QUEUES = 819_200  # bytes, the kernel's own default
_STACK = 8 << 20
_ADDRESS_SPACE = 4 << 30


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes; `timeout` in seconds of wall-clock time; `cpus` in cores, 0 for all."""

    timeout: float
    output: int
    memory: int
    processes: int
    file_size: int
    tmp_size: int
    network: bool = False
    cpus: float = 0.0

    @classmethod
    def of(cls, settings: Settings, timeout: float) -> Limits:
        """The limits in `settings`, with `timeout` if it is the shorter one."""
        return cls(
            timeout=min(timeout, settings.timeout),
            output=settings.output_limit,
            memory=settings.memory,
            processes=settings.pids,
            file_size=settings.file_size,
            tmp_size=settings.tmp_size,
            network=settings.network,
            cpus=settings.cpus,
        )


def enforced(limits: Limits) -> dict[str, str]:
    """By name what every backend enforces, and how."""
    network = {} if limits.network else {"network": "none, own network namespace"}
    return {
        "time": f"{limits.timeout:g} s, then all of the run is killed",
        "cpu_time": "RLIMIT_CPU, time x cores",
        "memory_per_process": f"{limits.memory} bytes, RLIMIT_DATA",
        "processes": f"{limits.processes}, RLIMIT_NPROC",
        "file_size": f"{limits.file_size} bytes, RLIMIT_FSIZE",
        "output": f"{limits.output} bytes per stream",
        **network,
        "system_files": "read-only, own mount namespace",
        "capabilities": "none",
        "system_calls": "seccomp allow-list",
    }


def not_enforced(limits: Limits) -> dict[str, str]:
    """By name what no backend enforces with these settings, and why."""
    if limits.network:
        return {"network": "NOX_NETWORK=on: a run reaches all that the runner's unit may reach"}
    return {}


def apply(pid: int, limits: Limits) -> None:
    """Set the resource limits of the process `pid`, which its later children inherit."""
    _set(pid, {**inherited(limits), **own(limits), **last()})
    # Where the host runs out of memory, runs should die before the services. Only a hint: a run
    # may take it back.
    with suppress(OSError), open(f"/proc/{pid}/oom_score_adj", "w") as file:
        file.write("1000")


def inherited(limits: Limits) -> dict[int, int]:
    """Resource limits that a process may hand on to its children without feeling them itself.

    Memory is limited by RLIMIT_DATA, which counts what a process may write to privately: heap,
    anonymous mappings, thread stacks. So one big allocation gets ENOMEM (MemoryError), while
    address space that is only reserved (allocator arenas, JITs) costs nothing, as it would
    with RLIMIT_AS. Shared mappings are not counted there; a wide RLIMIT_AS bounds them.
    """
    return _possible(
        {
            resource.RLIMIT_AS: max(_ADDRESS_SPACE, 4 * limits.memory),
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_DATA: limits.memory,
            resource.RLIMIT_FSIZE: limits.file_size,
            resource.RLIMIT_MEMLOCK: 64 << 10,
            resource.RLIMIT_STACK: _STACK,
        }
    )


def own(limits: Limits) -> dict[int, int]:
    """Those that a run's own process has to get.

    Processes, signals and message queues are counted per user namespace since Linux 5.14, so the
    process must be in the run's own already. CPU time counts all threads: it is a second net under
    the wall clock, and must not cut a program that uses each core for the whole of its time.
    """
    return _possible(
        {
            resource.RLIMIT_CPU: math.ceil(limits.timeout) * (os.cpu_count() or 1) + 1,
            resource.RLIMIT_NPROC: limits.processes,
            resource.RLIMIT_SIGPENDING: _PENDING_SIGNALS,
            resource.RLIMIT_MSGQUEUE: _MESSAGE_QUEUES,
        }
    )


def last() -> dict[int, int]:
    """What a run's process gets when it has nothing more to send to the runner.

    The kernel lets nobody send descriptors whose limit is below the number of those that are under
    way between all processes of the user, so the runs' is below the services'.
    """
    return _possible({resource.RLIMIT_NOFILE: _OPEN_FILES})


def adjust(pid: int, limits: Limits, before: Limits) -> None:
    """Set those that differ from `before`, which the process `pid` has; none may be raised."""
    old = {**inherited(before), **own(before)}
    new = {**inherited(limits), **own(limits)}
    _set(pid, {which: value for which, value in new.items() if value != old[which]})


def _possible(wanted: dict[int, int]) -> dict[int, int]:
    """The service's own hard limit may be lower, and cannot be raised without privilege."""
    hard = {which: resource.getrlimit(which)[1] for which in wanted}
    return {
        which: value if hard[which] == resource.RLIM_INFINITY else min(value, hard[which])
        for which, value in wanted.items()
    }


def _set(pid: int, wanted: dict[int, int]) -> None:
    for which, value in wanted.items():
        resource.prlimit(pid, which, (value, value))
