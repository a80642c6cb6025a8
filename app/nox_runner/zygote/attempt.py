"""One run in a sandbox that was ready: input, output, time, and who is waiting for it."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress

from nox_runner import usage
from nox_runner.backend import ClientGoneError, Outcome, Program
from nox_runner.command import SOURCES, own_environment
from nox_runner.limits import Limits
from nox_runner.output import Output
from nox_runner.protocol import Status
from nox_runner.zygote import child
from nox_runner.zygote.pool import Hatchling

_KILL_SECONDS = 10.0
_CHUNK = 64 << 10


class Attempt:
    """Gives a program to a sandbox and watches it to its end. `close` in any case."""

    def __init__(
        self,
        hatchling: Hatchling,
        program: Program,
        limits: Limits,
        client: socket.socket | None,
    ) -> None:
        self._hatchling = hatchling
        assert hatchling.notice is not None  # it has greeted
        self._notice = hatchling.notice
        self._listener = hatchling.notice.listener
        self._limits = limits
        self._client = client
        self._verdict: Status | None = None
        self._client_gone = False
        self._report: tuple[int, int, int] | None = None
        """Wait status, CPU time in µs, largest RSS in KiB."""
        self._usage = usage.Usage()
        self._done = False
        self._handlers: dict[int, Callable[[], None]] = {}
        self._poll = select.poll()
        self._open: set[int] = set()
        self._input = memoryview(program.stdin or b"")
        self._stdin = -1
        stdout, stderr = self._pipe(), self._pipe()
        theirs = [stdout[1], stderr[1]]
        if program.stdin is not None:
            inner, self._stdin = self._pipe()
            theirs.insert(0, inner)
            os.set_blocking(self._stdin, False)
        self._stdout = Output(stdout[0], limits.output)
        self._stderr = Output(stderr[0], limits.output)
        path = SOURCES[program.language]
        job = child.encode(program.language, path, program.args, own_environment(program))
        self._started = time.monotonic()
        self._deadline = self._started + limits.timeout
        _send(hatchling.job, child.JOB.pack(len(job)) + job, [program.source, *theirs])
        for descriptor in theirs:
            self._shut(descriptor)

    def run(self) -> Outcome:
        """Watch until the end; ClientGoneError if the client left before."""
        self._watch(self._hatchling.process, self._on_exit)
        if self._listener is not None:
            self._watch(self._listener, self._on_notice)
        self._watch(self._stdout.descriptor, lambda: self._on_output(self._stdout))
        self._watch(self._stderr.descriptor, lambda: self._on_output(self._stderr))
        if self._stdin >= 0:
            self._watch(self._stdin, self._on_stdin, select.POLLOUT)
        if self._client is not None:
            self._watch(self._client.fileno(), self._on_client)
        while not self._done:
            left = max(0.0, self._deadline - time.monotonic())
            for descriptor, _ in self._poll.poll(left * 1000 + 1):
                if handle := self._handlers.get(descriptor):
                    handle()
            if not self._done and time.monotonic() >= self._deadline:
                self._expire()
        finished = time.monotonic()
        for stream in (self._stdout, self._stderr):
            if stream.descriptor in self._open:
                stream.drain()
        if self._client_gone:
            raise ClientGoneError
        return self._outcome(finished)

    def close(self) -> None:
        """Let go of all, but for the sandbox itself."""
        for descriptor in list(self._open):
            self._shut(descriptor)

    def _pipe(self) -> tuple[int, int]:
        ends = os.pipe2(os.O_CLOEXEC)
        self._open.update(ends)
        return ends

    def _shut(self, descriptor: int) -> None:
        if descriptor in self._handlers:
            self._forget(descriptor)
        self._open.discard(descriptor)
        os.close(descriptor)

    def _watch(
        self, descriptor: int, handle: Callable[[], None], events: int = select.POLLIN
    ) -> None:
        self._handlers[descriptor] = handle
        self._poll.register(descriptor, events)

    def _forget(self, descriptor: int) -> None:
        del self._handlers[descriptor]
        self._poll.unregister(descriptor)

    def _on_exit(self) -> None:
        self._forget(self._hatchling.process)
        if self._listener is not None:
            self._forget(self._listener)
        alone = self._notice.is_alone()
        _, status, used = os.wait4(self._hatchling.pid, 0)
        if alone is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            # Between the two that it looks for there is a moment of neither.
            alone = self._notice.is_alone()
        if alone is not None:
            micros = round((used.ru_utime + used.ru_stime) * 1e6)
            self._report = (status, micros, used.ru_maxrss)
        if alone:
            self._done = True
            return
        # Others are left, or the init dies. With it everything does; that is awaited.
        self._hatchling.kill()
        self._deadline = time.monotonic() + _KILL_SECONDS
        self._watch(self._hatchling.init, self._on_ended)

    def _on_notice(self) -> None:
        found = self._notice.take(self._hatchling.pid)
        if found is None or self._verdict is not None:
            return
        self._report = (found.code << 8, found.cpu_us, found.max_rss_kib)
        self._done = True

    def _on_ended(self) -> None:
        self._done = True

    def _on_output(self, stream: Output) -> None:
        try:
            more = stream.read()
        except BlockingIOError:
            return
        if not more:
            self._shut(stream.descriptor)
        elif stream.truncated:
            self._forget(stream.descriptor)
            self._kill("output_limit")

    def _on_stdin(self) -> None:
        try:
            self._input = self._input[os.write(self._stdin, self._input[:_CHUNK]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._input = memoryview(b"")  # the program does not want the rest
        if not self._input:
            self._shut(self._stdin)

    def _on_client(self) -> None:
        assert self._client is not None
        try:
            self._client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            pass
        # At its end; or it speaks out of turn, which is no better.
        self._forget(self._client.fileno())
        self._client_gone = True
        self._kill("sandbox_error")  # a verdict that nobody will hear

    def _expire(self) -> None:
        if self._verdict is not None or self._report is not None:
            self._verdict = self._verdict or "sandbox_error"  # the kill does not come to an end
            self._done = True
        else:
            self._kill("timeout")

    def _kill(self, verdict: Status) -> None:
        if self._verdict is not None or self._report is not None:
            return
        self._verdict = verdict
        self._deadline = time.monotonic() + _KILL_SECONDS
        self._usage = usage.sample(self._hatchling.pid)
        if self._hatchling.group is not None:
            cpu_ms = max(self._usage.cpu_ms, self._hatchling.group.cpu_ms())
            self._usage = usage.Usage(cpu_ms, self._usage.max_rss_bytes)
        self._hatchling.kill()

    def _outcome(self, finished: float) -> Outcome:
        exit_code, died_of = None, None
        cpu_ms, rss = self._usage.cpu_ms, self._usage.max_rss_bytes
        status: Status = "error"
        if self._report is not None:
            told, micros, kibibytes = self._report
            cpu_ms = max(cpu_ms, -(-(micros - self._hatchling.spent_us) // 1000))
            rss = max(rss, kibibytes * 1024)
            if os.WIFSIGNALED(told):
                died_of = os.WTERMSIG(told)
            else:
                exit_code = os.WEXITSTATUS(told)
                status = "ok" if exit_code == 0 else "error"
        group = self._hatchling.group
        if group is not None:
            # Also of those that nobody waited for.
            cpu_ms = max(cpu_ms, group.cpu_ms())
            rss = max(rss, group.peak())
        if self._verdict is not None:
            status, exit_code, died_of = self._verdict, None, None
        elif self._stdout.truncated or self._stderr.truncated:
            status, exit_code, died_of = "output_limit", None, None
        elif (self._report is None or died_of == signal.SIGKILL) and (
            group is not None and group.out_of_memory()
        ):
            status, exit_code, died_of = "memory_limit", None, None
        elif self._report is None:
            status = "sandbox_error"  # nothing inside can kill the init, so something outside did
        return Outcome(
            status=status,
            exit_code=exit_code,
            signal=died_of,
            stdout=bytes(self._stdout.content),
            stderr=bytes(self._stderr.content),
            stdout_truncated=self._stdout.truncated,
            stderr_truncated=self._stderr.truncated,
            duration_ms=max(1, round((finished - self._started) * 1000)),
            cpu_ms=max(1, cpu_ms),
            max_rss_bytes=rss,
        )


def _send(job: socket.socket, message: bytes, descriptors: list[int]) -> None:
    rights = struct.pack(f"={len(descriptors)}i", *descriptors)
    sent = job.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    with suppress(ConnectionError):  # it ended meanwhile, which its report will tell
        if sent < len(message):
            job.sendall(message[sent:])
