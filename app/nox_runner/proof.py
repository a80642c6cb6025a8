"""The proof that the sandbox works on this host: a tiny program, really run."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from nox_runner.backend import Backend, Outcome, Program
from nox_runner.command import memory_file
from nox_runner.limits import Limits
from nox_runner.log import log
from nox_runner.settings import Settings

_RETRY_SECONDS = 3.0
_TIMEOUT = 10.0
# Long enough for the watch over temporary files to have looked once.
_PROGRAM = b"echo able >/tmp/proof; sleep 0.1; exec /bin/cat /tmp/proof"
_EXPECTED = b"able\n"


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
            reason = "" if outcome.stdout == _EXPECTED else _explain(outcome)
        self.reason = reason
        self._tried = time.monotonic()
        if reason:
            log("error", "sandbox_unable", backend=self._backend.name, reason=reason)
        elif before:
            log("info", "sandbox_able", backend=self._backend.name)

    def _run(self) -> Outcome:
        settings = self._settings()
        source = memory_file("proof", _PROGRAM)
        try:
            program = Program("proof", "sh", source, None, [], {})
            limits = Limits.of(settings, max(settings.timeout, _TIMEOUT))
            return self._backend.run(program, limits, settings.sandbox, None)
        finally:
            os.close(source)


def _explain(outcome: Outcome) -> str:
    told = outcome.stderr.decode("utf-8", "replace").strip()
    return f"a trial run ended with {outcome.status}: {told or 'no message'}"
