"""The operations of the protocol: one connection, from its request to its reply."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from nox_runner import __version__, directories, files, listing, protocol
from nox_runner.backend import Backend, ClientGoneError, Outcome, Program
from nox_runner.command import memory_file
from nox_runner.limits import Limits
from nox_runner.log import log
from nox_runner.proof import Proof
from nox_runner.protocol import Failure, ProtocolError
from nox_runner.quota import Lease, Quota
from nox_runner.settings import Settings
from nox_runner.slots import Slots

SILENCE = 30.0
"""Seconds that a peer may keep a connection waiting in the middle of a message."""

# The front frees a slot when its client is gone, a moment before the killed run frees ours.
_SLOT_PATIENCE = 5.0
_MAX_CHANGED = 1000
_OVER_QUOTA = (
    b"nox: the sandbox's quota was exceeded; what was written since this run began is removed\n"
)


@dataclass
class Service:
    """What the operations share. `settings` is replaced as a whole by a reload."""

    settings: Settings
    backend: Backend
    proof: Proof
    slots: Slots = field(init=False)
    quota: Quota = field(init=False)

    def __post_init__(self) -> None:
        self.slots = Slots(lambda: self.settings.slots)
        self.quota = Quota(lambda: self.settings)

    def serve(self, connection: socket.socket) -> None:
        """Answer the one request of `connection`. Every failure is told to the peer or logged."""
        connection.settimeout(SILENCE)
        try:
            self._answer(connection)
        except ClientGoneError:
            pass
        except Failure as failure:
            level = "error" if failure.code == "internal" else "debug"
            log(level, "refused", code=failure.code, reason=failure.message)
            _tell(connection, failure)
        except ProtocolError as error:
            log("warning", "protocol_error", reason=str(error))
            _tell(connection, Failure("protocol", str(error)))
        except (ConnectionError, TimeoutError) as error:
            log("debug", "peer_gone", reason=str(error))
        except OSError as error:
            log("error", "operation_failed", reason=str(error))
            _tell(connection, Failure("internal", "the runner lacks a resource; see its log"))

    def _answer(self, connection: socket.socket) -> None:
        request = protocol.decode_request(protocol.receive_frame(connection, protocol.MAX_HEADER))
        if isinstance(request, protocol.Health):
            connection.sendall(protocol.encode_reply(self._health()))
            return
        directories.give_back(self.settings.sandbox)
        if isinstance(request, protocol.Run):
            try:
                self._run(request, connection)
            finally:
                self.backend.settle()
        elif isinstance(request, protocol.Put):
            self._put(request, connection)
        elif isinstance(request, protocol.Get):
            self._get(request, connection)
        elif isinstance(request, protocol.List):
            found = listing.take(self.settings.sandbox)
            reply = protocol.ListReply(found.files, found.truncated)
            connection.sendall(protocol.encode_reply(reply))
        else:
            files.delete(self.settings.sandbox, request.path)
            self.quota.touched()
            connection.sendall(protocol.encode_reply(protocol.DeleteReply(request.path)))

    def _health(self) -> protocol.HealthReply:
        able = self.proof.able()
        limits = Limits.of(self.settings, self.settings.timeout)
        # A backend that does not work cannot tell what it enforces.
        enforced = self.backend.enforced(limits) if able else {}
        not_enforced = {**self.backend.not_enforced(limits), **self.proof.missing} if able else {}
        return protocol.HealthReply(
            able=able,
            reason=self.proof.reason,
            backend=self.backend.name,
            version=__version__,
            slots_used=self.slots.used,
            slots_total=self.settings.slots,
            sandbox=self.quota.usage(),
            enforced=enforced,
            not_enforced=not_enforced,
        )

    def _run(self, request: protocol.Run, connection: socket.socket) -> None:
        settings = self.settings
        with _source(connection, settings.max_body) as source:
            stdin = b"".join(_bounded(connection, settings.max_body))
            if request.timeout <= 0:
                raise ProtocolError("a timeout that is not positive")
            with self.slots.one(_SLOT_PATIENCE) as held:
                if not held:
                    raise Failure("busy", "no slot became free")
                if not self.proof.able():
                    raise Failure("unable", self.proof.reason)
                program = Program(
                    request.run_id,
                    request.language,
                    source,
                    stdin if request.stdin else None,
                    request.args,
                    request.env,
                )
                limits = Limits.of(settings, request.timeout)
                before = listing.take(settings.sandbox) if request.files else None
                with self.quota.run(connection) as lease:
                    outcome = self._outcome(program, limits, settings.sandbox, lease)
                if lease.exceeded:
                    outcome = _over_quota(outcome)
        changed = None
        if before is not None:
            changed = listing.changed(before, listing.take(settings.sandbox), _MAX_CHANGED)
        try:
            _reply_run(connection, outcome, changed)
        finally:
            # The client need not wait for it.
            _log_run(program, outcome)

    def _outcome(self, program: Program, limits: Limits, sandbox: str, lease: Lease) -> Outcome:
        started = time.monotonic()
        try:
            outcome = self.backend.run(program, limits, sandbox, lease.connection)
        except ClientGoneError:
            after = round((time.monotonic() - started) * 1000)
            if lease.exceeded:
                return _cut(after)
            log("info", "run_cancelled", run_id=program.run_id, after_ms=after)
            raise
        except OSError as error:
            self.proof.doubt()
            log("error", "sandbox_error", run_id=program.run_id, reason=str(error))
            raise Failure("unable", "the sandbox could not be started") from None
        if outcome.status == "sandbox_error":
            self.proof.doubt()
            told = outcome.stderr.decode("utf-8", "replace")
            log("error", "sandbox_error", run_id=program.run_id, reason=told)
        return outcome

    def _put(self, request: protocol.Put, connection: socket.socket) -> None:
        settings = self.settings
        content = protocol.receive_stream(connection)
        try:
            with self.quota.upload(request.path) as upload:
                reply = files.put(
                    settings.sandbox,
                    request.path,
                    request.overwrite,
                    upload.metered(content),
                    settings.max_body,
                    upload.begun,
                    upload.stored,
                )
        except Failure:
            # The peer listens only when it has said all.
            for _ in content:
                pass
            raise
        connection.sendall(protocol.encode_reply(reply))

    def _get(self, request: protocol.Get, connection: socket.socket) -> None:
        with files.reading(self.settings.sandbox, request.path) as (descriptor, state):
            reply = protocol.GetReply(state.st_size, state.st_mtime)
            connection.sendall(protocol.encode_reply(reply))
            for chunk in files.chunks(descriptor, state.st_size, protocol.CHUNK):
                connection.sendall(protocol.frame(chunk))
            connection.sendall(protocol.END)


def _log_run(program: Program, outcome: Outcome) -> None:
    log(
        "info",
        "run",
        run_id=program.run_id,
        language=program.language,
        status=outcome.status,
        duration_ms=outcome.duration_ms,
    )


def _cut(after_ms: int) -> Outcome:
    """A run that was killed for the quota; what it had printed went with it."""
    return Outcome("output_limit", None, None, b"", b"", False, False, after_ms, 0, 0)


def _over_quota(outcome: Outcome) -> Outcome:
    return replace(outcome, status="output_limit", stderr=outcome.stderr + _OVER_QUOTA)


def _reply_run(
    connection: socket.socket, outcome: Outcome, changed: list[protocol.File] | None
) -> None:
    reply = protocol.RunReply(
        status=outcome.status,
        exit_code=outcome.exit_code,
        signal=outcome.signal,
        stdout_truncated=outcome.stdout_truncated,
        stderr_truncated=outcome.stderr_truncated,
        duration_ms=outcome.duration_ms,
        cpu_ms=outcome.cpu_ms,
        max_rss_bytes=outcome.max_rss_bytes,
        files=changed,
    )
    pieces = [protocol.encode_reply(reply)]
    for content in (outcome.stdout, outcome.stderr):
        pieces += protocol.stream(content)
    connection.sendall(b"".join(pieces))


def _bounded(connection: socket.socket, limit: int) -> Iterator[bytes]:
    size = 0
    for chunk in protocol.receive_stream(connection):
        size += len(chunk)
        if size > limit:
            raise ProtocolError(f"a stream of more than {limit} bytes")
        yield chunk


@contextmanager
def _source(connection: socket.socket, limit: int) -> Iterator[int]:
    """The stream of a program's text as a memfd at its start."""
    descriptor = memory_file("program")
    try:
        for chunk in _bounded(connection, limit):
            os.write(descriptor, chunk)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _tell(connection: socket.socket, failure: Failure) -> None:
    with suppress(OSError):
        connection.sendall(protocol.encode_failure(failure))
