"""Keeps sandboxes ready: starts the zygote, asks it for more, replaces it when it is gone."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

import nox_runner
from nox_runner import limits as resource_limits
from nox_runner import orphans, seccomp
from nox_runner.command import (
    ABSENT,
    ETC_FROM_HOST,
    ETC_WITH_NETWORK,
    ROOTS,
    RUN_SIZE,
    environment,
    etc,
    memory_file,
)
from nox_runner.control_group import Group, Groups
from nox_runner.limits import Limits
from nox_runner.log import log
from nox_runner.tmpfs import MAX_FILES
from nox_runner.zygote import child, nest
from nox_runner.zygote.notice import Notice

_PYTHON = "/usr/bin/python3"
_START_SECONDS = 20.0
_HATCH_SECONDS = 10.0
_RETRY_SECONDS = 1.0
_STRAYS_SECONDS = 5.0
# A refill competes with the answer on its way to the client, so it lets that one go first.
_BREATH = 0.004
_SIDE_BY_SIDE = (os.cpu_count() or 1) + 1
"""Sandboxes that are made at a time: one for each core, and one that the zygote forks meanwhile."""
_CREDENTIALS = struct.Struct("=iII")
_INT = struct.Struct("=i")
_LIBRARY = os.path.dirname(os.path.dirname(os.path.abspath(nox_runner.__file__)))
_START = f"""
import sys
sys.dont_write_bytecode = True
sys.path.append({_LIBRARY!r})
from nox_runner.zygote import kernel
hooks = kernel.ForkHooks()
import socket
from nox_runner.zygote import nest
sys.exit(nest.main(socket.socket(fileno=int(sys.argv[1])), hooks))
"""


@dataclass(frozen=True)
class Plan:
    """What all sandboxes of one zygote have in common. Another plan takes another zygote."""

    sandbox: str
    sandbox_id: tuple[int, int]
    limits: Limits
    text_size: int
    preimport: tuple[str, ...]
    spare: int


@dataclass
class _Zygote:
    """The process that was started for it, and the socket it is asked by."""

    starter: subprocess.Popen[bytes]
    control: socket.socket
    others: dict[int, int] = field(default_factory=dict)
    """By their numbers, pidfds of its two other processes."""

    def is_alive(self) -> bool:
        """Whether it still makes sandboxes, if it is asked."""
        return self.starter.poll() is None

    def end(self) -> list[int]:
        """End it, and all that it made; the pidfds of those that are to be buried then."""
        self.control.close()
        self.starter.kill()
        self.starter.wait()
        for pipe in (self.starter.stdin, self.starter.stdout, self.starter.stderr):
            if pipe is not None:
                pipe.close()
        return list(self.others.values())


@dataclass
class Hatchling:
    """A sandbox whose program's process waits for its job. `close` ends it, whatever it does."""

    init: int
    """pidfd of the first process, with which all others end."""
    process: int
    """pidfd of the program's process, a child of this one. `pid` is its number until its burial."""
    job: socket.socket
    zygote: _Zygote
    pid: int = 0
    spent_us: int = 0
    notice: Notice | None = None
    group: Group | None = None

    def has_ended(self) -> bool:
        """Whether one of the two is dead, and so all of it is or can't be used."""
        poll = select.poll()  # no limit on the descriptor's number
        for handle in (self.init, self.process):
            poll.register(handle, select.POLLIN)
        return bool(poll.poll(0))

    def kill(self) -> None:
        """End all of its processes; returns at once."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.init, signal.SIGKILL)

    def close(self) -> None:
        """Kill what is left and let go of it, but for `process`, which is to be buried."""
        self.kill()
        self.job.close()
        if self.notice is not None:
            self.notice.close()
        os.close(self.init)


class Pool:
    """Sandboxes for one plan at a time. One thread of its own does all that takes time."""

    def __init__(self, groups: Groups | None) -> None:
        self._filters = {
            "zygote": seccomp.zygote_program(),
            "init": seccomp.init_program(),
            "run": seccomp.rest_program(telling=False),
        }
        try:
            self._filters["telling_run"] = seccomp.rest_program(telling=True)
        except OSError as error:
            # Then it is seen how a program ended when it has, a bit later.
            log("warning", "no_exit_notice", reason=str(error))
        self._groups = groups
        self._lock = threading.Lock()
        # Two, so that those who wait for a sandbox never wake each other.
        self._changed = threading.Condition(self._lock)
        """Waited for by the thread that makes sandboxes."""
        self._came = threading.Condition(self._lock)
        """Waited for by those who want one."""
        self._ready: deque[Hatchling] = deque()
        self._spent: deque[Hatchling] = deque()
        self._dying: list[int] = []
        """pidfds of programs' processes that ended or were killed."""
        self._emptying: list[Group] = []
        self._plan: Plan | None = None
        self.landlock = 0
        """Version of Landlock that the sandboxes have, 0 if none."""
        self._zygote: _Zygote | None = None
        self._left: list[_Zygote] = []
        """Zygotes that make no more sandboxes, but whose programs still run."""
        self._taken: dict[int, _Zygote] = {}
        """By the numbers of processes whose end is awaited by who took them, whose they are."""
        self._strays_until = 0.0
        self._made_for: Plan | None = None
        self._failure = ""
        self._failures = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    def take(self, plan: Plan, patience: float) -> Hatchling:
        """A ready sandbox, the caller's to close. OSError if there is none within `patience` s."""
        deadline = time.monotonic() + patience
        with self._changed:
            if plan != self._plan:
                self._plan = plan
                self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._keep, name="zygote", daemon=True)
                self._thread.start()
            failures = self._failures
            while True:
                while self._made_for == plan and self._ready:
                    hatchling = self._ready.popleft()
                    if not hatchling.has_ended():
                        self._taken[hatchling.pid] = hatchling.zygote
                        return hatchling
                    # It died while it waited, with the zygote most likely.
                    self._spent.append(hatchling)
                    self._changed.notify_all()
                left = deadline - time.monotonic()
                if left <= 0 or self._failures > failures + 1:
                    raise OSError(self._failure or "no sandbox was ready in time")
                self._came.wait(left)

    def give_back(self, hatchling: Hatchling) -> None:
        """What was taken has come to its end, or is to; `refill` ends it, and makes another."""
        self._spent.append(hatchling)
        self._taken.pop(hatchling.pid, None)

    def refill(self) -> None:
        """See that what is missing is made. Apart from giving back: no answer waits for it."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """End the zygote and every sandbox of it, for good."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._leave(at_once=True)
        for zygote in self._left:
            self._end(zygote)
        self._left.clear()
        self._bury()

    def _keep(self) -> None:
        while not self._closed:
            with self._changed:
                burying = self._dying or self._emptying or self._looks_for_strays()
                self._changed.wait_for(self._has_work, timeout=0.05 if burying else 60)
                plan, hurry = self._plan, len(self._ready) < 2
            if self._closed:
                return
            if not hurry:
                time.sleep(_BREATH)
            self._bury()
            if plan is None:
                continue
            try:
                if self._made_for != plan or not self._is_alive():
                    self._leave(at_once=not self._is_alive())
                    self._start(plan)
                self._hatch(plan)
            except (OSError, ValueError, struct.error) as error:
                self._fail(str(error))

    def _bury(self) -> None:
        while self._spent:
            hatchling = self._spent.popleft()
            hatchling.close()
            self._dying.append(hatchling.process)
            if hatchling.group is not None:
                hatchling.group.kill()
                self._emptying.append(hatchling.group)
        self._emptying = [group for group in self._emptying if not group.remove()]
        for zygote in [one for one in self._left if not (self._has_taken(one) and one.is_alive())]:
            self._left.remove(zygote)
            self._end(zygote)
        self._dying = [process for process in self._dying if not _bury(process)]
        if self._looks_for_strays():
            self._bury_strays()

    def _has_taken(self, zygote: _Zygote) -> bool:
        """Whether a program of its runs."""
        return any(one is zygote for one in tuple(self._taken.values()))

    def _end(self, zygote: _Zygote) -> None:
        self._dying += zygote.end()
        self._strays_until = time.monotonic() + _STRAYS_SECONDS

    def _looks_for_strays(self) -> bool:
        return time.monotonic() < self._strays_until

    def _bury_strays(self) -> None:
        """Those that a zygote had made and not told of when it ended."""
        with self._lock:
            known = {*self._taken, *(hatchling.pid for hatchling in self._ready)}
            for zygote in (*self._left, *([self._zygote] if self._zygote else ())):
                known |= {zygote.starter.pid, *zygote.others}
            for pid in set(orphans.children()) - known:
                with suppress(ChildProcessError):
                    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)

    def _has_work(self) -> bool:
        plan = self._plan
        if self._closed or self._spent:
            return True
        return plan is not None and (
            self._made_for != plan or len(self._ready) < plan.spare or not self._is_alive()
        )

    def _is_alive(self) -> bool:
        return self._zygote is not None and self._zygote.is_alive()

    def _fail(self, reason: str) -> None:
        log("error", "zygote_failed", reason=reason)
        # Whose sandboxes can't be had any more may still run what it has.
        self._leave(at_once=not self._is_alive())
        with self._changed:
            self._failure = reason
            self._failures += 1
            self._came.notify_all()
        time.sleep(_RETRY_SECONDS)

    def _start(self, plan: Plan) -> None:
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        filters = {name: memory_file("seccomp", text) for name, text in self._filters.items()}
        try:
            control.settimeout(_START_SECONDS)
            starter = subprocess.Popen(
                [_PYTHON, "-I", "-c", _START, str(theirs.fileno())],
                # Pipes, as the runs will have, so that the streams are set up for pipes.
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd="/",
                # All that a run can read in its own /proc/self/environ.
                env={"LANG": "C.UTF-8"},
                pass_fds=[theirs.fileno(), *filters.values()],
                start_new_session=True,
            )
            zygote = self._zygote = _Zygote(starter, control)
            control.send(json.dumps({**_config(plan), "filters": filters}).encode())
        except BaseException:
            if self._zygote is None:
                control.close()
            raise
        finally:
            theirs.close()
            for descriptor in filters.values():
                os.close(descriptor)
        told = control.recv(1 << 16)
        if told[:1] != nest.READY:
            raise OSError(f"the zygote does not start: {_reason(told[1:], starter)}")
        found = json.loads(told[1:])
        zygote.others = {pid: os.pidfd_open(pid) for pid in found["processes"]}
        self.landlock = found["landlock"]
        for name, reason in found["skipped"].items():
            log("warning", "preimport_skipped", module=name, reason=reason)
        with self._changed:
            self._made_for = plan
        log("info", "zygote_started", pid=starter.pid)

    def _leave(self, *, at_once: bool) -> None:
        """Have the zygote make no more; it ends with the last program of its, or `at_once`."""
        with self._changed:
            self._made_for = None
            self._spent.extend(self._ready)
            self._ready.clear()
        zygote, self._zygote = self._zygote, None
        if zygote is None:
            return
        if at_once:
            self._end(zygote)
        else:
            self._left.append(zygote)
        self._bury()

    def _hatch(self, plan: Plan) -> None:
        """Make sandboxes until none is missing, some of them side by side."""
        zygote = self._zygote
        assert zygote is not None
        control = zygote.control
        control.settimeout(_HATCH_SECONDS)
        asked = 0
        made: deque[Hatchling] = deque()
        try:
            while True:
                wanted = self._plan == plan and not self._closed
                missing = plan.spare - len(self._ready) if wanted else 0
                if (more := min(missing, _SIDE_BY_SIDE) - asked) > 0:
                    # Nobody gains by a rehearsal who waits for it.
                    kind = nest.REHEARSED if self._ready else nest.PLAIN
                    control.send(kind * more)
                    asked += more
                if not asked:
                    return
                made.append(_receive(zygote))
                self._greet(made[0])
                with self._changed:
                    self._ready.append(made.popleft())
                    self._failure = ""
                    self._came.notify()
                asked -= 1
                self._bury()
        finally:
            for hatchling in made:
                hatchling.kill()
            self._spent.extend(made)

    def _greet(self, hatchling: Hatchling) -> None:
        hatchling.job.settimeout(_HATCH_SECONDS)
        hatchling.pid, hatchling.spent_us, hatchling.notice = _greeting(hatchling.job)
        assert self._made_for is not None
        if self._groups is not None:
            hatchling.group = self._groups.make(self._made_for.limits)
            hatchling.group.add(hatchling.pid)


def _receive(zygote: _Zygote) -> Hatchling:
    told, descriptors, _, _ = socket.recv_fds(zygote.control, 4096, 3, socket.MSG_CMSG_CLOEXEC)
    if told[:1] != nest.CHILD or len(descriptors) != 3:
        for descriptor in descriptors:
            os.close(descriptor)
        raise OSError(f"the zygote makes no sandbox: {_reason(told[1:], zygote.starter)}")
    job, init, process = descriptors
    return Hatchling(init, process, socket.socket(fileno=job), zygote)


def _bury(process: int) -> bool:
    """Take note of a child's end, and let go of its pidfd; whether it has ended."""
    try:
        if os.waitid(os.P_PIDFD, process, os.WEXITED | os.WNOHANG) is None:
            return False
    except ChildProcessError:
        pass  # who watched the program has done it
    os.close(process)
    return True


def _greeting(job: socket.socket) -> tuple[int, int, Notice]:
    most = len(child.FILES) + 1
    size = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(most * _INT.size)
    text, ancillary, _, _ = job.recvmsg(4096, size, socket.MSG_CMSG_CLOEXEC)
    found = {kind: data for level, kind, data in ancillary if level == socket.SOL_SOCKET}
    descriptors = [number for (number,) in _INT.iter_unpack(found.get(socket.SCM_RIGHTS, b""))]
    listener = descriptors.pop() if len(descriptors) == most else None
    notice = Notice(descriptors, listener)
    try:
        return *_introduction(text, found), notice
    except OSError:
        notice.close()
        raise


def _introduction(text: bytes, found: dict[int, bytes]) -> tuple[int, int]:
    if text[:1] == child.FAILED and len(text) != child.READY.size:
        raise OSError(f"a sandbox cannot be made: {text[1:].decode('utf-8', 'replace')}")
    if len(text) != child.READY.size:
        raise OSError("a sandbox ended before it was ready")
    if socket.SCM_CREDENTIALS not in found:
        raise OSError("a sandbox came without its process's number")
    pid, _uid, _gid = _CREDENTIALS.unpack(found[socket.SCM_CREDENTIALS])
    return pid, child.READY.unpack(text)[0]


def _reason(told: bytes, zygote: subprocess.Popen[bytes]) -> str:
    if told:
        return told.decode("utf-8", "replace")
    assert zygote.stderr is not None
    try:
        zygote.wait(2)
    except subprocess.TimeoutExpired:
        return "no answer"
    os.set_blocking(zygote.stderr.fileno(), False)
    text = zygote.stderr.read() or b""
    lines = text.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else f"it ended with {zygote.returncode}"


def _config(plan: Plan) -> dict[str, object]:
    network = plan.limits.network
    links = {} if plan.sandbox.startswith("/var/tmp/") else {"/var/tmp": "/tmp"}
    if os.path.islink("/etc/localtime"):
        links["/etc/localtime"] = os.readlink("/etc/localtime")
    return {
        "library": _LIBRARY,
        "uid": os.getuid(),
        "gid": os.getgid(),
        "sandbox": plan.sandbox,
        "inherited_limits": list(resource_limits.inherited(plan.limits).items()),
        "own_limits": list(resource_limits.own(plan.limits).items()),
        "last_limits": list(resource_limits.last().items()),
        "tmp_size": plan.limits.tmp_size,
        "tmp_files": MAX_FILES,
        "run_size": RUN_SIZE + plan.text_size,
        "preimport": plan.preimport,
        # Looked for here: all that is read for it would be in each sandbox's way.
        "absent": ABSENT,
        "roots": ["/usr", *(f"/{name}" for name in ROOTS if os.path.isdir(f"/{name}"))],
        "network": network,
        "etc_from_host": [*ETC_FROM_HOST, *(ETC_WITH_NETWORK if network else ())],
        "links": links,
        "environment": {**environment(plan.sandbox), "PWD": plan.sandbox},
        "files": etc(plan.sandbox, network),
    }
