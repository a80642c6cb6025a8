"""The proof that the sandbox works on this host: a program that tries its walls, really run."""

from __future__ import annotations

import inspect
import json
import os
import threading
import time
from collections.abc import Callable

from nox_runner import directories, probe
from nox_runner.backend import Backend, Outcome, Program
from nox_runner.command import memory_file
from nox_runner.limits import Limits
from nox_runner.log import log
from nox_runner.settings import Settings

_RETRY_SECONDS = 3.0
_TIMEOUT = 10.0
_PROGRAM = inspect.getsource(probe).encode()
_NAMESPACES = ("user", "pid", "mnt", "net", "ipc", "uts", "cgroup")
_HOSTS_OWN = ("/tmp", "/dev/shm")
_ENVIRONMENT = (
    *("HOME", "LANG", "LC_CTYPE", "NOX_RUN_ID", "PATH", "PWD"),
    *("PYTHONNOUSERSITE", "TMPDIR", "USER"),
)


class Proof:
    """Remembers whether the sandbox works, and looks again when that is in doubt."""

    def __init__(self, backend: Backend, settings: Callable[[], Settings]) -> None:
        self._backend = backend
        self._settings = settings
        self._lock = threading.Lock()
        self._tried = float("-inf")
        self._doubted = False
        self.reason = "not tried yet"
        """Why the sandbox does not work; empty if it does."""
        self.missing: dict[str, str] = {}
        """By name the limits that were seen not to hold, and what was seen."""

    def doubt(self) -> None:
        """A run could not be started: look again soon. Until then it counts as a single case."""
        self._doubted = True

    def able(self) -> bool:
        """Whether the sandbox works. After a failure or doubt it is tried, every 3 s at most."""
        in_question = bool(self.reason) or self._doubted
        if in_question and self._lock.acquire(blocking=False):
            try:
                if time.monotonic() - self._tried >= _RETRY_SECONDS:
                    self._prove()
            finally:
                self._lock.release()
        return not self.reason

    def _prove(self) -> None:
        self._doubted = False
        before = self.reason
        try:
            outcome = self._run()
        except OSError as error:
            reason = f"the sandbox does not start: {error}"
        else:
            reason, self.missing = _judge(outcome)
        self.reason = reason
        self._tried = time.monotonic()
        if reason:
            log("error", "sandbox_unable", backend=self._backend.name, reason=reason)
        elif before:
            log("info", "sandbox_able", backend=self._backend.name)

    def _run(self) -> Outcome:
        settings = self._settings()
        directories.give_back(settings.sandbox)
        source = memory_file("proof", _PROGRAM)
        try:
            limits = Limits.of(settings, max(settings.timeout, _TIMEOUT))
            expected = json.dumps(_expectation(limits))
            program = Program("proof", "python", source, None, [expected], {})
            return self._backend.run(program, limits, settings.sandbox, None)
        finally:
            self._backend.settle()
            os.close(source)


def _expectation(limits: Limits) -> dict[str, object]:
    namespaces = [name for name in _NAMESPACES if name != "net" or not limits.network]
    return {
        "namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in namespaces},
        "network": limits.network,
        "devices": [os.stat(path).st_dev for path in _HOSTS_OWN if os.path.exists(path)],
        "environment": _ENVIRONMENT,
        "resources": {
            "RLIMIT_CORE": 0,
            "RLIMIT_DATA": limits.memory,
            "RLIMIT_NPROC": limits.processes,
            "RLIMIT_FSIZE": max(limits.file_size, len(_PROGRAM)),
        },
    }


def _judge(outcome: Outcome) -> tuple[str, dict[str, str]]:
    """Why the sandbox does not do, or nothing; and by name the limits that do not hold."""
    try:
        found = json.loads(outcome.stdout)
        walls, limits = dict(found["walls"]), dict(found["limits"])
    except (ValueError, KeyError, TypeError):
        told = outcome.stderr.decode("utf-8", "replace").strip()
        return f"a trial run ended with {outcome.status}: {told or 'no message'}", {}
    told = "; ".join(f"{name}: {seen}" for name, seen in walls.items())
    return (f"the sandbox is open: {told}" if told else ""), limits
