"""The seam between the runner and a way to run a program in a sandbox."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Protocol

from nox_runner.limits import Limits
from nox_runner.protocol import Language, Status


@dataclass(frozen=True)
class Program:
    """What to run. `source` is a memfd, read from its start and closed by the caller."""

    run_id: str
    language: Language
    source: int
    stdin: bytes | None
    args: list[str]
    env: dict[str, str]


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    exit_code      what the program returned; None if it died of a signal, was killed, or never ran
    signal         what the program died of; None if it exited, was killed by Nox, or never ran
    stdout, stderr at most Limits.output bytes each; `*_truncated` tells which overflowed
    duration_ms    from the start of the sandbox to its end
    cpu_ms         user and system time of all processes that were waited for, and of the sandbox's
                   own set-up
    max_rss_bytes  of the largest single process
    """

    status: Status
    exit_code: int | None
    signal: int | None
    stdout: bytes
    stderr: bytes
    stdout_truncated: bool
    stderr_truncated: bool
    duration_ms: int
    cpu_ms: int
    max_rss_bytes: int


class ClientGoneError(Exception):
    """The client closed its connection; its run has been killed."""


class Backend(Protocol):
    """One way to run a program in a sandbox. `run` is called by many threads at once."""

    @property
    def name(self) -> str:
        """Short name for health and logs."""

    def run(
        self, program: Program, limits: Limits, sandbox: str, client: socket.socket | None
    ) -> Outcome:
        """Run to the end, and leave nothing behind.

        `sandbox` is the absolute path of the working directory. Raises ClientGoneError when
        `client` is closed before the end, OSError when the host lacks what it takes to start.
        """

    def settle(self) -> None:
        """To be called after each run, when its answer is out: what could wait is done now."""

    def enforced(self, limits: Limits) -> dict[str, str]:
        """By name the limits that hold, and how."""

    def not_enforced(self, limits: Limits) -> dict[str, str]:
        """By name the limits that one could expect but that do not hold, and why."""
