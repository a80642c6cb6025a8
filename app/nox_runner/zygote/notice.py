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

# SECCOMP_IOCTL_NOTIF_RECV, _SEND, _ID_VALID
_RECEIVE, _SEND, _VALID = 0xC0502100, 0xC0182101, 0x40082102
_NOTICE = struct.Struct("=QII iIQ6Q")
"""struct seccomp_notif: id, pid, flags; call, processor, address, arguments."""
_ANSWER = struct.Struct("=QqiI")
"""struct seccomp_notif_resp: id, value, error, flags."""
_CONTINUE = 1
_LIBRARYS = 1 << 32 - 1 | 1 << 33 - 1
"""The two that the C library keeps for itself, and blocks for nobody."""
_BLOCKABLE = (1 << 64) - 1 & ~(1 << 9 - 1 | 1 << 19 - 1 | _LIBRARYS)
"""All other signals but SIGKILL and SIGSTOP."""
_CPUCLOCK_SCHED = 2
_EXITING = 0x4
"""PF_EXITING, of a process's flags."""
_KILL_PENDING = 1 << 9 - 1
_SIZE = 8192


@dataclass(frozen=True)
class Exit:
    """How a program ended: its exit code, CPU time in µs since its fork, largest RSS in KiB."""

    code: int
    cpu_us: int
    max_rss_kib: int


class Notice:
    """The notices of one sandbox; none without a `listener`. `close` lets go of whoever waits."""

    def __init__(self, files: list[int], listener: int | None) -> None:
        """`files` as child.FILES names them."""
        self._files = files
        self.listener = listener

    def take(self, pid: int) -> Exit | None:
        """The exit of the process `pid` if that is what the notice tells of, and it is alone.

        It stays where it is then. Who else is told of goes on: another process of the program, or
        one that leaves others, which are to be awaited.
        """
        assert self.listener is not None
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
        if told == pid and (found := self._exit(pid, code & 0xFF)) and self._waits(number):
            return found
        with suppress(OSError):  # likewise
            fcntl.ioctl(self.listener, _SEND, bytearray(_ANSWER.pack(number, 0, 0, _CONTINUE)))
        return None

    def is_alone(self) -> bool | None:
        """Of a program that has ended: whether nobody is left in its sandbox but the init.

        None if that one is about to end itself: so the sandbox was killed, and it the first.
        """
        try:
            stat, children = (os.pread(file, _SIZE, 0) for file in self._files[:2])
        except ProcessLookupError:
            return None
        fields = stat.rpartition(b")")[2].split()
        if int(fields[6]) & _EXITING or int(fields[28]) & _KILL_PENDING:
            return None
        return not children

    def close(self) -> None:
        """Close all descriptors."""
        if self.listener is not None:
            os.close(self.listener)
        for descriptor in self._files:
            os.close(descriptor)

    def _waits(self, number: int) -> bool:
        """Whether the process still stands in that call."""
        assert self.listener is not None
        try:
            fcntl.ioctl(self.listener, _VALID, struct.pack("=Q", number))
        except OSError:
            return False
        return True

    def _exit(self, pid: int, code: int) -> Exit | None:
        """None if others are there, it may yet go on, or children's use is to be added up."""
        try:
            # In this order: a thread that ends leaves its children to the other one, and a child
            # that ends leaves its own to the init.
            files = (self._files[which] for which in (2, 3, 1, 4))
            status, children, of_init, stat = (os.pread(file, _SIZE, 0) for file in files)
            told = dict(line.split(b":", 1) for line in status.splitlines())
            faults_of_children = int(stat.rpartition(b")")[2].split()[8])
            if (
                int(told[b"Threads"]) != 1
                # A signal would interrupt the call, and have a handler run.
                or int(told[b"SigBlk"], 16) & _BLOCKABLE != _BLOCKABLE
                or int(told[b"SigCgt"], 16) & ~int(told[b"SigBlk"], 16) & _LIBRARYS
                or children
                or of_init
                or faults_of_children
            ):
                return None
            cpu = time.clock_gettime_ns((~pid << 3) | _CPUCLOCK_SCHED)
            return Exit(code, cpu // 1000, int(told[b"VmHWM"].split()[0]))
        except (OSError, ValueError, LookupError):
            return None
