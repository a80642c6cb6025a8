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
from dataclasses import dataclass

import nox_runner
from nox_runner import limits as resource_limits
from nox_runner import orphans, seccomp
from nox_runner.command import (
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
from nox_runner.zygote.notice import COUNT, Notice

_PYTHON = "/usr/bin/python3"
_START_SECONDS = 20.0
_HATCH_SECONDS = 10.0
_RETRY_SECONDS = 1.0
# A refill competes with the answer on its way to the client, so it lets that one go first.
_BREATH = 0.004
_CORES = os.cpu_count() or 1
_CREDENTIALS = struct.Struct("=iII")
_INT = struct.Struct("=i")
_LIBRARY = os.path.dirname(os.path.dirname(os.path.abspath(nox_runner.__file__)))
_START = f"""
import sys
sys.dont_write_bytecode = True
sys.path.append({_LIBRARY!r})
import socket
from nox_runner.zygote import nest
sys.exit(nest.main(socket.socket(fileno=int(sys.argv[1]))))
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
class Hatchling:
    """A sandbox whose program's process waits for its job. `close` ends it, whatever it does."""

    init: int
    handle: int
    report: int
    job: socket.socket
    pid: int
    spent_us: int
    notice: Notice | None = None
    group: Group | None = None

    def has_ended(self) -> bool:
        """Whether its init is dead, and so all of it; then `pid` may be another process's."""
        poll = select.poll()  # no limit on the descriptor's number
        poll.register(self.handle, select.POLLIN)
        return bool(poll.poll(0))

    def is_sealed(self, patience: float) -> bool:
        """Whether its init tells within `patience` s that it has given up its privileges."""
        poll = select.poll()
        poll.register(self.report, select.POLLIN)
        return bool(poll.poll(patience * 1000)) and os.read(self.report, 1) == child.SEALED

    def kill(self) -> None:
        """End all of its processes; returns at once."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.handle, signal.SIGKILL)

    def close(self) -> None:
        """Kill what is left and let go of it."""
        self.kill()
        self.job.close()
        if self.notice is not None:
            self.notice.close()
        os.close(self.report)
        os.close(self.handle)


class Pool:
    """Sandboxes for one plan at a time. One thread of its own does all that takes time."""

    def __init__(self, groups: Groups | None) -> None:
        self._filters = {
            "seal": seccomp.program(),
            "init_seal": seccomp.init_program(),
        }
        try:
            self._filters["notice"] = seccomp.notice_program()
        except OSError as error:
            # Then the init alone tells how a program ended, a bit later.
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
        self._emptying: list[Group] = []
        self._plan: Plan | None = None
        self.landlock = 0
        """Version of Landlock that the sandboxes have, 0 if none."""
        self._zygote: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
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
                        return hatchling
                    # It died while it waited, with the zygote most likely.
                    self._spent.append(hatchling)
                    self._changed.notify_all()
                left = deadline - time.monotonic()
                if left <= 0 or self._failures > failures + 1:
                    raise OSError(self._failure or "no sandbox was ready in time")
                self._came.wait(left)

    def give_back(self, hatchling: Hatchling) -> None:
        """What was taken has come to its end, or is to; `refill` closes it, and makes another."""
        hatchling.kill()
        self._spent.append(hatchling)

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
        self._stop()
        self._bury()

    def _keep(self) -> None:
        while not self._closed:
            with self._changed:
                self._changed.wait_for(
                    self._has_work, timeout=0.05 if self._dying or self._emptying else 60
                )
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
                    self._stop()
                    self._start(plan)
                while (missing := plan.spare - len(self._ready)) > 0 and self._plan == plan:
                    self._hatch(min(missing, _CORES))
                    self._bury()
            except (OSError, ValueError, struct.error) as error:
                self._fail(str(error))

    def _bury(self) -> None:
        while self._spent:
            hatchling = self._spent.popleft()
            hatchling.close()
            self._dying.append(hatchling.init)
            if hatchling.group is not None:
                hatchling.group.kill()
                self._emptying.append(hatchling.group)
        self._emptying = [group for group in self._emptying if not group.remove()]
        # Their parent is the zygote; of one that died, this process has inherited them.
        self._dying = [pid for pid in set(self._dying) if _is_dying(pid)]

    def _has_work(self) -> bool:
        plan = self._plan
        if self._closed or self._spent:
            return True
        return plan is not None and (
            self._made_for != plan or len(self._ready) < plan.spare or not self._is_alive()
        )

    def _is_alive(self) -> bool:
        return self._zygote is not None and self._zygote.poll() is None

    def _fail(self, reason: str) -> None:
        log("error", "zygote_failed", reason=reason)
        self._stop()
        with self._changed:
            self._failure = reason
            self._failures += 1
            self._came.notify_all()
        time.sleep(_RETRY_SECONDS)

    def _start(self, plan: Plan) -> None:
        control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        filters = {name: memory_file("seccomp", text) for name, text in self._filters.items()}
        try:
            self._control = control
            control.settimeout(_START_SECONDS)
            self._zygote = subprocess.Popen(
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
            control.send(json.dumps({**_config(plan), **filters}).encode())
        finally:
            theirs.close()
            for descriptor in filters.values():
                os.close(descriptor)
        told = control.recv(1 << 16)
        if told[:1] != nest.READY:
            raise OSError(f"the zygote does not start: {_reason(told[1:], self._zygote)}")
        found = json.loads(told[1:])
        self.landlock = found["landlock"]
        for name, reason in found["skipped"].items():
            log("warning", "preimport_skipped", module=name, reason=reason)
        with self._changed:
            self._made_for = plan
        log("info", "zygote_started", pid=self._zygote.pid)

    def _stop(self) -> None:
        with self._changed:
            self._made_for = None
            unwanted = list(self._ready)
            self._ready.clear()
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._zygote is not None:
            # Those that run are its children, and would end with it: it ends after them.
            self._zygote.kill()
            self._zygote.wait()
            for pipe in (self._zygote.stdin, self._zygote.stdout, self._zygote.stderr):
                if pipe is not None:
                    pipe.close()
            self._zygote = None
        self._spent.extend(unwanted)
        # Also one that the zygote made but had not told of. Nothing else is started here.
        self._dying += orphans.children()
        self._bury()

    def _hatch(self, count: int) -> None:
        """Make `count` sandboxes, side by side."""
        control, zygote = self._control, self._zygote
        assert control is not None and zygote is not None
        control.settimeout(_HATCH_SECONDS)
        control.send(b"1" * count)
        made: deque[Hatchling] = deque()
        try:
            for _ in range(count):
                made.append(_receive(control, zygote))
            while made:
                self._greet(made[0])
                with self._changed:
                    self._ready.append(made.popleft())
                    self._failure = ""
                    self._came.notify()
        finally:
            for hatchling in made:
                hatchling.kill()
            self._spent.extend(made)

    def _greet(self, hatchling: Hatchling) -> None:
        hatchling.job.settimeout(_HATCH_SECONDS)
        hatchling.pid, hatchling.spent_us, hatchling.notice = _greeting(hatchling.job)
        if not hatchling.is_sealed(_HATCH_SECONDS):
            raise OSError("the init of a sandbox ended before it was ready")
        assert self._made_for is not None
        resource_limits.apply_ahead(hatchling.pid, self._made_for.limits)
        if self._groups is not None:
            hatchling.group = self._groups.make(self._made_for.limits)
            for pid in (hatchling.init, hatchling.pid):
                hatchling.group.add(pid)


def _receive(control: socket.socket, zygote: subprocess.Popen[bytes]) -> Hatchling:
    told, descriptors, _, _ = socket.recv_fds(control, 4096, 3, socket.MSG_CMSG_CLOEXEC)
    if told[:1] != nest.CHILD or len(descriptors) != 3:
        for descriptor in descriptors:
            os.close(descriptor)
        raise OSError(f"the zygote makes no sandbox: {_reason(told[1:], zygote)}")
    job = socket.socket(fileno=descriptors[0])
    return Hatchling(int(told[1:]), descriptors[2], descriptors[1], job, 0, 0)


def _is_dying(pid: int) -> bool:
    """Whether the process is a child of this one that has not ended yet."""
    try:
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    except ChildProcessError:
        return False


def _greeting(job: socket.socket) -> tuple[int, int, Notice | None]:
    size = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(COUNT * _INT.size)
    text, ancillary, _, _ = job.recvmsg(4096, size, socket.MSG_CMSG_CLOEXEC)
    found = {kind: data for level, kind, data in ancillary if level == socket.SOL_SOCKET}
    descriptors = [number for (number,) in _INT.iter_unpack(found.get(socket.SCM_RIGHTS, b""))]
    notice = Notice(descriptors) if descriptors else None
    try:
        return *_introduction(text, found), notice
    except OSError:
        if notice is not None:
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
        "tmp_size": plan.limits.tmp_size,
        "tmp_files": MAX_FILES,
        "run_size": RUN_SIZE + plan.text_size,
        "preimport": plan.preimport,
        "roots": ["/usr", *(f"/{name}" for name in ROOTS if os.path.isdir(f"/{name}"))],
        "network": network,
        "etc_from_host": [*ETC_FROM_HOST, *(ETC_WITH_NETWORK if network else ())],
        "links": links,
        "environment": {**environment(plan.sandbox), "PWD": plan.sandbox},
        "files": etc(plan.sandbox, network),
    }
