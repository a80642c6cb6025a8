"""The backend that starts one bubblewrap per run."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from contextlib import ExitStack
from dataclasses import replace

from nox_runner import control_group
from nox_runner import limits as resource_limits
from nox_runner.backend import Outcome, Program
from nox_runner.command import Command, memory_file
from nox_runner.control_group import Group, Groups
from nox_runner.limits import Limits
from nox_runner.supervision import Supervision
from nox_runner.tmpfs import MAX_FILES, Watch


class Bubblewrap:
    """Fresh namespaces for each run, by an unprivileged bubblewrap."""

    name = "bubblewrap"

    def __init__(
        self,
        command: Command,
        call_filter: bytes,
        groups: Groups | None,
        why: str,
        instead_of: str = "",
    ) -> None:
        """`why` tells why there are no control groups, if there are none; `instead_of` why this
        one is used where a faster one was wanted."""
        self._command = command
        self._filter = call_filter
        self._groups = groups
        self._why = why
        self._instead_of = instead_of
        self._watch = Watch()

    def run(
        self, program: Program, limits: Limits, sandbox: str, client: socket.socket | None
    ) -> Outcome:
        """See Backend.run."""
        # bubblewrap copies the program's text to a file under the same limit.
        text_size = os.fstat(program.source).st_size
        limits = replace(limits, file_size=max(limits.file_size, text_size))
        if self._groups is None:
            return self._run(program, limits, sandbox, client, None)
        group = self._groups.make(limits)
        try:
            return self._run(program, limits, sandbox, client, group)
        finally:
            group.end()

    def _run(
        self,
        program: Program,
        limits: Limits,
        sandbox: str,
        client: socket.socket | None,
        group: Group | None,
    ) -> Outcome:
        with ExitStack() as inherited:
            gate_read, gate = os.pipe()
            inherited.callback(os.close, gate_read)
            status, status_write = os.pipe()
            inherited.callback(os.close, status_write)
            with ExitStack() as kept:
                kept.callback(os.close, gate)
                kept.callback(os.close, status)
                options, descriptors = self._command.options(
                    program, limits, sandbox, gate_read, status_write, inherited, self._filter
                )
                arguments = memory_file("arguments", options)
                inherited.callback(os.close, arguments)
                bwrap = subprocess.Popen(
                    self._command.argv(arguments, program),
                    stdin=subprocess.DEVNULL if program.stdin is None else subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    bufsize=0,
                    cwd="/",
                    # Empty: the environment of the namespace's init can be read from inside.
                    env={},
                    pass_fds=[arguments, *descriptors],
                    start_new_session=True,
                )
                kept.pop_all()
            supervision = Supervision(
                bwrap,
                gate=gate,
                status=status,
                stdin=program.stdin or b"",
                limits=limits,
                watch=self._watch,
                client=client,
                group=group,
            )
        # Here this side has closed what bubblewrap inherited, so that each pipe has an end.
        try:
            return supervision.run()
        finally:
            supervision.close()

    def settle(self) -> None:
        """See Backend.settle."""

    def enforced(self, limits: Limits) -> dict[str, str]:
        """See Backend.enforced."""
        enforced = resource_limits.enforced(limits)
        each = "each for /tmp and /dev/shm"
        watched = "watched: a run that has more is killed"
        if self._command.sizes_tmpfs:
            enforced["tmp_size"] = f"{limits.tmp_size} bytes {each}"
        elif not self._watch.blind:
            enforced["tmp_size"] = f"{limits.tmp_size} bytes {each}, {watched}"
        if not self._watch.blind:
            enforced["tmp_files"] = f"{MAX_FILES} {each}, {watched}"
        return {**enforced, **(self._groups.enforced(limits) if self._groups else {})}

    def not_enforced(self, limits: Limits) -> dict[str, str]:
        """See Backend.not_enforced."""
        missing = {
            **resource_limits.not_enforced(limits),
            "landlock": "only the zygote backend has it",
            **(self._groups.not_enforced() if self._groups else control_group.missing(self._why)),
        }
        if self._instead_of:
            missing["fast_start"] = self._instead_of
        if self._watch.blind:
            missing["tmp_files"] = self._watch.blind
            if not self._command.sizes_tmpfs:
                version = ".".join(map(str, self._command.version))
                missing["tmp_size"] = f"bubblewrap {version} has no --size; {self._watch.blind}"
        if _kernel() < (5, 14) and not (self._groups and "pids" in self._groups.controllers):
            missing["processes_per_run"] = (
                "before Linux 5.14 the limit on processes counts all runs together"
            )
        return missing


def _kernel() -> tuple[int, int]:
    major, minor = platform.release().split(".")[:2]
    return int(major), int("".join(filter(str.isdigit, minor)) or 0)
