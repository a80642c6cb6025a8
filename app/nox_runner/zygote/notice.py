"""What the kernel tells of a program's exit, before it takes the program's memory apart.

That takes it longer than a short program runs. The process stands still in its last system call
until it is let go, or killed; the code is what the kernel found in that call, so nobody else can
say it.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import time
from contextlib import suppress
from dataclasses import dataclass

COUNT = 5
"""Descriptors: the listener, and those that child.NOTICE_FILES names."""

_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, _SEND
_NOTICE = struct.Struct("=QII iIQ6Q")
"""struct seccomp_notif: id, pid, flags; call, processor, address, arguments."""
_ANSWER = struct.Struct("=QqiI")
"""struct seccomp_notif_resp: id, value, error, flags."""
_CONTINUE = 1
_CPUCLOCK_SCHED = 2
_SIZE = 8192


@dataclass(frozen=True)
class Exit:
    """How a program ended: its exit code, CPU time in µs since its fork, largest RSS in KiB."""

    code: int
    cpu_us: int
    max_rss_kib: int


class Notice:
    """The notices of one sandbox. `close` lets go of whoever waits."""

    def __init__(self, descriptors: list[int]) -> None:
        self.listener, *self._files = descriptors

    def take(self, pid: int) -> Exit | None:
        """The exit of the process `pid` if that is what the notice tells of, and it is alone.

        It stays where it is then. Who else is told of goes on: another process of the program, or
        one that leaves others, which are to be awaited.
        """
        poll = select.poll()
        poll.register(self.listener, select.POLLIN)
        if not any(events & select.POLLIN for _, events in poll.poll(0)):
            return None  # or the call would wait
        notice = bytearray(_NOTICE.size)
        try:
            fcntl.ioctl(self.listener, _RECEIVE, notice)
        except OSError:
            return None  # a signal has ended it meanwhile
        number, told, *_, code, _, _, _, _, _ = _NOTICE.unpack(notice)
        if told == pid and (found := self._exit(pid, code & 0xFF)):
            return found
        with suppress(OSError):  # likewise
            fcntl.ioctl(self.listener, _SEND, bytearray(_ANSWER.pack(number, 0, 0, _CONTINUE)))
        return None

    def close(self) -> None:
        """Close all descriptors."""
        for descriptor in (self.listener, *self._files):
            os.close(descriptor)

    def _exit(self, pid: int, code: int) -> Exit | None:
        """None if other threads or processes are there, or children's use has to be added up."""
        try:
            # In this order: what its children leave behind comes to the init.
            children, of_init, stat, status = (os.pread(file, _SIZE, 0) for file in self._files)
            fields = stat.rpartition(b")")[2].split()
            threads, faults_of_children = int(fields[17]), int(fields[8])
            if children or of_init.split() != [b"2"] or threads != 1 or faults_of_children:
                return None
            _, _, peak = status.partition(b"VmHWM:")
            cpu = time.clock_gettime_ns((~pid << 3) | _CPUCLOCK_SCHED)
            return Exit(code, cpu // 1000, int(peak.split(maxsplit=1)[0]))
        except (OSError, ValueError, IndexError):
            return None
