"""The backend that takes each run's sandbox from a pool of ready ones."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace

from nox_runner import control_group
from nox_runner import limits as resource_limits
from nox_runner.backend import Outcome, Program
from nox_runner.control_group import Groups
from nox_runner.limits import Limits
from nox_runner.settings import Settings
from nox_runner.tmpfs import MAX_FILES
from nox_runner.zygote.attempt import Attempt
from nox_runner.zygote.pool import Plan, Pool

_PATIENCE = 10.0
_TRIES = 3


class Zygote:
    """Fresh namespaces for each run, made ahead; each is used once."""

    name = "zygote"

    def __init__(
        self,
        settings: Callable[[], Settings],
        groups: Groups | None,
        why: str,
    ) -> None:
        """`why` tells why there are no control groups, if there are none.

        OSError where a filter for system calls cannot be made.
        """
        self._pool = Pool(groups)
        self._settings = settings
        self._groups = groups
        self._why = why
        self._planned: tuple[Settings, Plan] | None = None

    def run(
        self, program: Program, limits: Limits, sandbox: str, client: socket.socket | None
    ) -> Outcome:
        """See Backend.run."""
        # The program's text is written to a file under the same limit.
        text_size = os.fstat(program.source).st_size
        if text_size > limits.file_size:
            limits = replace(limits, file_size=text_size)
        plan = self._plan(sandbox)
        for left in reversed(range(_TRIES)):
            hatchling = self._pool.take(plan, _PATIENCE)
            try:
                resource_limits.adjust(hatchling.pid, limits, plan.limits)
                attempt = Attempt(hatchling, program, limits, client)
            except (ConnectionError, ProcessLookupError):
                # It died in this very moment.
                self._pool.give_back(hatchling)
                self._pool.refill()
                if not left:
                    raise
                continue
            except BaseException:
                self._pool.give_back(hatchling)
                raise
            try:
                return attempt.run()
            finally:
                attempt.close()
                self._pool.give_back(hatchling)
        raise AssertionError("unreachable")

    def settle(self) -> None:
        """See Backend.settle."""
        self._pool.refill()

    def close(self) -> None:
        """Give up all that was made ahead."""
        self._pool.close()

    def _plan(self, sandbox: str) -> Plan:
        settings = self._settings()
        state = os.stat(sandbox)
        place = state.st_dev, state.st_ino
        last = self._planned
        if last and last[0] is settings and last[1].sandbox_id == place:
            return last[1]
        plan = Plan(
            sandbox=sandbox,
            # A directory that took the place of the old one has to be mounted anew.
            sandbox_id=place,
            # None of these may be raised later, for a program with a long text.
            limits=replace(
                Limits.of(settings, settings.timeout),
                file_size=max(settings.file_size, settings.max_body),
            ),
            text_size=settings.max_body,
            preimport=settings.preimport,
            spare=max(4, 2 * settings.slots),
        )
        self._planned = settings, plan
        return plan

    def enforced(self, limits: Limits) -> dict[str, str]:
        """See Backend.enforced."""
        each = "each for /tmp and /dev/shm"
        enforced = {
            **resource_limits.enforced(limits),
            "tmp_size": f"{limits.tmp_size} bytes {each}",
            "tmp_files": f"{MAX_FILES} {each}",
            **(self._groups.enforced(limits) if self._groups else {}),
        }
        if self._pool.landlock:
            enforced["landlock"] = f"version {self._pool.landlock}, for files"
        return enforced

    def not_enforced(self, limits: Limits) -> dict[str, str]:
        """See Backend.not_enforced."""
        missing = {
            **resource_limits.not_enforced(limits),
            **(self._groups.not_enforced() if self._groups else control_group.missing(self._why)),
        }
        if not self._pool.landlock:
            missing["landlock"] = "this kernel has none of version 2 (Linux 5.19), or it is barred"
        return missing
