"""What the processes of a run have used so far, read from /proc."""

from __future__ import annotations

import os
from dataclasses import dataclass

_MAX_PROCESSES = 4096
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """CPU time of all processes, and the largest resident set that one of them had."""

    cpu_ms: int = 0
    max_rss_bytes: int = 0


def sample(init: int) -> Usage:
    """The usage of `init` and its descendants, to the kernel's clock tick (10 ms).

    Wanted just before a kill: of processes that die with the init of their namespace the kernel
    keeps no account. Processes that end while this looks are not counted.
    """
    ticks = peak = 0
    waiting, seen = [init], 0
    while waiting and seen < _MAX_PROCESSES:
        pid, seen = waiting.pop(), seen + 1
        try:
            ticks += _ticks(pid)
            peak = max(peak, _peak(pid))
            for thread in os.listdir(f"/proc/{pid}/task"):
                waiting += map(int, _read(f"/proc/{pid}/task/{thread}/children").split())
        except (OSError, ValueError):
            continue
    return Usage(ticks * 1000 // _TICKS_PER_SECOND, peak)


def parent(pid: int) -> int:
    """The parent of the process `pid`; ProcessLookupError if there is no such process."""
    try:
        return int(_stat(pid)[1])
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None


def _ticks(pid: int) -> int:
    return sum(int(field) for field in _stat(pid)[11:15])  # utime, stime, cutime, cstime


def _stat(pid: int) -> list[bytes]:
    # The command's name, in parentheses, may hold anything; the other fields follow the last one.
    return _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()


def _peak(pid: int) -> int:
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith(b"VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
