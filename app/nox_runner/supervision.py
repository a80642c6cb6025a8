"""One run from the sandbox's start to its end: input, output, time, and who is waiting for it."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack

from nox_runner import limits as resource_limits
from nox_runner import orphans, tmpfs, usage
from nox_runner.backend import ClientGoneError, Outcome
from nox_runner.control_group import Group
from nox_runner.limits import Limits
from nox_runner.output import Output
from nox_runner.protocol import Status
from nox_runner.tmpfs import Watch

_SETUP_SECONDS = 10.0
_KILL_SECONDS = 10.0
_CHUNK = 64 << 10

# bubblewrap tells 128 + n for a program that died of signal n, as a shell does. Only signals that
# end a process by default are read that way; an exit code in their range cannot be told apart.
_HARMLESS = {
    signal.SIGCHLD,
    signal.SIGCONT,
    signal.SIGSTOP,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGURG,
    signal.SIGWINCH,
}
_DEADLY = {number for number in range(1, 32) if number not in _HARMLESS}


class Supervision:
    """Watches a started bubblewrap. Its program waits at the `gate` until it has its limits.

    Used by one thread, the one that started it: bubblewrap dies with that very thread
    (--die-with-parent). All descriptors given are closed by `close`.
    """

    def __init__(
        self,
        bwrap: subprocess.Popen[bytes],
        *,
        gate: int,
        status: int,
        stdin: bytes,
        limits: Limits,
        watch: Watch,
        client: socket.socket | None,
        group: Group | None,
    ) -> None:
        self._bwrap = bwrap
        self._group = group
        self._limits = limits
        self._watch = watch
        self._client = client
        self._gate: int | None = gate
        self._status = status
        self._told = b""
        self._exit_code: int | None = None
        self._init: int | None = None
        self._init_handle: int | None = None
        self._verdict: Status | None = None
        self._client_gone = False
        self._ended = False
        self._usage = usage.Usage()
        self._started = time.monotonic()
        self._finished = self._started
        self._deadline = self._started + _SETUP_SECONDS
        self._next_look = self._started + tmpfs.INTERVAL
        self._stdin = memoryview(stdin)
        assert bwrap.stdout is not None and bwrap.stderr is not None
        self._stdout = Output(bwrap.stdout.fileno(), limits.output)
        self._stderr = Output(bwrap.stderr.fileno(), limits.output)
        self._buried = False
        self._selector: selectors.BaseSelector
        self._closing = ExitStack()

    def run(self) -> Outcome:
        """Watch until the end; ClientGoneError if the client left before."""
        self._register_all()
        while not self._ended:
            events = self._selector.select(self._patience())
            for key, _ in events:
                handle: Callable[[], None] = key.data
                handle()
            if not self._ended:
                self._look()
        self._finished = time.monotonic()
        if self._status in self._selector.get_map():
            self._on_status()  # what bubblewrap told at the very last
        self._bury()
        self._drain()
        if self._client_gone:
            raise ClientGoneError
        return self._outcome()

    def close(self) -> None:
        """End what still runs, and close every descriptor."""
        if not self._buried:
            self._bwrap.kill()
            self._bury()
        for pipe in (self._bwrap.stdin, self._bwrap.stdout, self._bwrap.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        for descriptor in (self._gate, self._status, self._init_handle):
            if descriptor is not None:
                os.close(descriptor)
        self._closing.close()

    def _register_all(self) -> None:
        self._selector = self._closing.enter_context(selectors.DefaultSelector())
        ended = os.pidfd_open(self._bwrap.pid)
        self._closing.callback(os.close, ended)
        self._register(ended, self._on_ended)
        os.set_blocking(self._status, False)
        self._register(self._status, self._on_status)
        self._register(self._stdout.descriptor, lambda: self._on_output(self._stdout))
        self._register(self._stderr.descriptor, lambda: self._on_output(self._stderr))
        if self._bwrap.stdin is not None:
            os.set_blocking(self._bwrap.stdin.fileno(), False)
            self._selector.register(self._bwrap.stdin, selectors.EVENT_WRITE, self._on_stdin)
        if self._client is not None:
            self._register(self._client, self._on_client)

    def _register(self, source: int | socket.socket, handle: Callable[[], None]) -> None:
        self._selector.register(source, selectors.EVENT_READ, handle)

    def _on_ended(self) -> None:
        self._ended = True

    def _on_status(self) -> None:
        try:
            data = os.read(self._status, _CHUNK)
        except BlockingIOError:
            return
        if not data:
            self._selector.unregister(self._status)
            return
        *lines, self._told = (self._told + data).split(b"\n")
        for line in lines:
            if line.strip():
                self._on_report(json.loads(line))

    def _on_report(self, report: dict[str, int]) -> None:
        if "exit-code" in report:
            self._exit_code = report["exit-code"]
        elif "child-pid" in report:
            with contextlib.suppress(ProcessLookupError):  # set-up failed meanwhile
                self._take_init(report["child-pid"])

    def _take_init(self, pid: int) -> None:
        handle = os.pidfd_open(pid)
        # The number may be another process's by now. It is not if its parent is bubblewrap, not
        # reaped yet, or this process, which adopts what bubblewrap leaves.
        if usage.parent(pid) not in (self._bwrap.pid, os.getpid()):
            os.close(handle)
            return
        self._init, self._init_handle = pid, handle
        self._open_gate()

    def _open_gate(self) -> None:
        assert self._init is not None and self._init_handle is not None and self._gate is not None
        if self._verdict is not None:
            _kill(self._init_handle)
            return
        # Its init is in the run's own user namespace since its clone, so no other run's processes
        # count, and bubblewrap lets no program begin before the gate is open.
        resource_limits.apply(self._init, self._limits)
        if self._group is not None:
            self._group.add(self._init)
        os.close(self._gate)
        self._gate = None
        self._started = time.monotonic()
        self._deadline = self._started + self._limits.timeout
        self._next_look = self._started + tmpfs.INTERVAL

    def _on_output(self, stream: Output) -> None:
        try:
            more = stream.read()
        except BlockingIOError:
            return
        if not more:
            self._selector.unregister(stream.descriptor)
        elif stream.truncated:
            self._selector.unregister(stream.descriptor)
            self._kill("output_limit")

    def _on_stdin(self) -> None:
        pipe = self._bwrap.stdin
        assert pipe is not None
        try:
            self._stdin = self._stdin[os.write(pipe.fileno(), self._stdin[:_CHUNK]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._stdin = memoryview(b"")  # the program does not want the rest
        if not self._stdin:
            self._selector.unregister(pipe)
            pipe.close()

    def _on_client(self) -> None:
        assert self._client is not None
        try:
            self._client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            pass
        # At its end; or it speaks out of turn, which is no better.
        self._selector.unregister(self._client)
        self._client_gone = True
        self._kill("sandbox_error")  # a verdict that nobody will hear

    def _patience(self) -> float:
        """Seconds until there is something to look at without an event."""
        left = self._deadline - time.monotonic()
        return max(0.0, min(left, tmpfs.INTERVAL) if self._is_running() else left)

    def _is_running(self) -> bool:
        return self._gate is None and self._verdict is None

    def _look(self) -> None:
        now = time.monotonic()
        if now >= self._deadline:
            self._expire()
        elif self._is_running() and now >= self._next_look:
            self._next_look = now + tmpfs.INTERVAL
            if self._init and self._watch.exceeded(self._init, self._limits.tmp_size):
                self._kill("memory_limit")

    def _expire(self) -> None:
        if self._verdict is not None or self._gate is not None:
            # Neither the kill nor the set-up came to an end: the last resort.
            self._verdict = self._verdict or "sandbox_error"
            self._bwrap.kill()
            self._deadline = time.monotonic() + _KILL_SECONDS
        else:
            self._kill("timeout")

    def _kill(self, verdict: Status) -> None:
        """Kill all of the run. bubblewrap sees its init die, and ends by itself."""
        if self._verdict is not None:
            return
        self._verdict = verdict
        self._deadline = time.monotonic() + _KILL_SECONDS
        # bubblewrap itself is not killed before it has told its child: that one would be left
        # waiting for ever. It is killed when it is told.
        if self._init is not None and self._init_handle is not None:
            self._usage = usage.sample(self._init)
            if self._group is not None:
                cpu_ms = max(self._usage.cpu_ms, self._group.cpu_ms())
                self._usage = usage.Usage(cpu_ms, self._usage.max_rss_bytes)
            _kill(self._init_handle)

    def _bury(self) -> None:
        self._buried = True
        if self._init_handle is not None:
            _kill(self._init_handle)
        self._bwrap.wait()
        if self._init is None or self._init_handle is None:
            return
        spent = orphans.bury(self._init)
        if spent is not None:
            cpu_ms = round((spent.ru_utime + spent.ru_stime) * 1000)
            self._usage = usage.Usage(
                max(self._usage.cpu_ms, cpu_ms),
                max(self._usage.max_rss_bytes, spent.ru_maxrss * 1024),  # the kernel tells KiB
            )

    def _drain(self) -> None:
        """Read what was written last. No writer is left, so nothing here waits."""
        for stream in (self._stdout, self._stderr):
            stream.drain()

    def _outcome(self) -> Outcome:
        told, exit_code, died_of = self._exit_code, None, None
        status: Status
        if self._verdict is not None:
            status = self._verdict
        elif self._stdout.truncated or self._stderr.truncated:
            status = "output_limit"
        elif told in (None, 128 + signal.SIGKILL) and self._group and self._group.out_of_memory():
            status = "memory_limit"
        elif told is None or not 0 <= told <= 255:
            status = "sandbox_error"  # bubblewrap ended before the program began, or is not itself
        elif told - 128 in _DEADLY:
            status, died_of = "error", told - 128
        else:
            status, exit_code = "ok" if told == 0 else "error", told
        return Outcome(
            status=status,
            exit_code=exit_code,
            signal=died_of,
            stdout=bytes(self._stdout.content),
            stderr=bytes(self._stderr.content),
            stdout_truncated=self._stdout.truncated,
            stderr_truncated=self._stderr.truncated,
            duration_ms=round((self._finished - self._started) * 1000),
            cpu_ms=self._usage.cpu_ms,
            max_rss_bytes=max(self._usage.max_rss_bytes, self._group.peak() if self._group else 0),
        )


def _kill(handle: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(handle, signal.SIGKILL)
