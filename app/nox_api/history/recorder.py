"""The front's end of the history: a bounded queue, one task, and the process that writes."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import logging
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from nox_api.history.record import (
    MAX_SCRIPT,
    Digest,
    Outcome,
    Output,
    Record,
    message,
    milliseconds,
    parse,
)
from nox_api.settings import FrontSettings
from nox_runner import protocol

DEFAULT_PATH = "/var/lib/nox-api/history"

_MAX_WAITING = 16 << 20
"""Bytes of runs that wait for the writer; whatever comes then is dropped."""
_PER_RUN = 4096
"""What a run's record weighs at most but for its parts that are counted."""
_IN_A_THREAD = 128 << 10
"""Bytes that are digested at once; more would hold up the event loop."""
_ANSWER_SECONDS = 10.0
_STOP_SECONDS = 10.0
_RETRY_SECONDS = 5.0
_log = logging.getLogger("nox.history")


class HistoryUnavailableError(Exception):
    """The history is on, but cannot be used; the message says why."""


@dataclass(frozen=True)
class FinishedRun:
    """`reply`, `stdout` and `stderr` are missing if its client left before its end."""

    run: protocol.Run
    source: bytes
    stdin: bytes
    reply: protocol.RunReply | None = None
    stdout: bytes = b""
    stderr: bytes = b""

    @property
    def weight(self) -> int:
        words = sum(map(len, self.run.args))
        contents = (self.source, self.stdin, self.stdout, self.stderr)
        return _PER_RUN + words + sum(map(len, contents))


class Recorder:
    """Used by one event loop. `record` never blocks and never fails; what is lost is counted."""

    def __init__(self, path: str, settings: FrontSettings) -> None:
        self.recorded = 0
        self.dropped = 0
        self.bytes = 0
        self.failed = ""
        """Why nothing is written now; empty if all is well."""
        self._path = path
        self._settings = settings
        self._writer: _Writer | None = None
        self._not_before = 0.0

    @property
    def on(self) -> bool:
        return self._settings.history

    def apply(self, settings: FrontSettings) -> None:
        """Follow the settings: start, adjust or end the writer."""
        self._settings = settings
        if not settings.history:
            writer, self._writer = self._writer, None
            if writer is not None:
                writer.finish()
            self.failed = ""
        elif self._writer is None:
            self._not_before = 0.0
            self._start()
        else:
            limits = {"days": settings.history_days, "size": settings.history_size}
            self._writer.send(message({"op": "limits", **limits}))

    def record(self, finished: FinishedRun) -> None:
        """Hand `finished` over if the history is on."""
        if not self.on:
            return
        writer = self._writer or self._start()
        if writer is None or not writer.take(finished):
            self.dropped += 1

    async def ask(self, operation: str, **fields: object) -> tuple[dict[str, Any], bytes]:
        """The writer's answer; HistoryUnavailableError if there is none."""
        writer = self._writer or self._start()
        if writer is None:
            raise HistoryUnavailableError(self.failed)
        try:
            answer, content = await asyncio.wait_for(writer.ask(operation, fields), _ANSWER_SECONDS)
        except asyncio.TimeoutError:
            raise HistoryUnavailableError("it does not answer in time") from None
        if failed := answer.get("failed"):
            raise HistoryUnavailableError(failed)
        return answer, content

    async def close(self) -> None:
        """End the writer after it has written what it was handed."""
        writer, self._writer = self._writer, None
        if writer is not None:
            await writer.close()

    def _start(self) -> _Writer | None:
        if time.monotonic() < self._not_before:
            return None
        self._not_before = time.monotonic() + _RETRY_SECONDS
        try:
            self._writer = _Writer(self, self._path, self._settings)
        except OSError as error:
            self.fail(f"its writer cannot be started: {error}")
        return self._writer

    def fail(self, reason: str) -> None:
        """Nothing can be written, for `reason`."""
        if reason != self.failed:
            _log.error("history_failed", extra={"fields": {"reason": reason}})
        self.failed = reason

    def heard(self, state: dict[str, Any]) -> None:
        """The writer tells how it fares."""
        self.recorded += state["recorded"]
        self.dropped += state["lost"]
        self.bytes = state["bytes"]
        if state["failed"]:
            self.fail(state["failed"])
        elif self.failed:
            _log.info("history_recovered")
            self.failed = ""

    def ended(self, writer: _Writer, lost: int) -> None:
        """The writer's process is gone, and with it so many runs that it had not written."""
        self.dropped += lost
        if writer is self._writer:
            self._writer = None
            self.fail(self.failed or "its writer ended")


class _Writer:
    """The process, what waits for it, and what it was asked."""

    def __init__(self, recorder: Recorder, path: str, settings: FrontSettings) -> None:
        self._recorder = recorder
        ours, theirs = socket.socketpair()
        with theirs:
            isolated = ["-I"] if sys.flags.isolated else []
            limits = ["--days", str(settings.history_days), "--size", str(settings.history_size)]
            try:
                self._process = subprocess.Popen(
                    [sys.executable, *isolated, "-m", "nox_api.history", "--path", path,
                     "--descriptor", str(theirs.fileno()), *limits],
                    pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                )  # fmt: skip
            except OSError:
                ours.close()
                raise
        self._waiting: deque[FinishedRun | bytes | None] = deque()
        self._weight = 0
        self._handed = 0
        self._something = asyncio.Event()
        self._questions: dict[int, asyncio.Future[tuple[dict[str, Any], bytes]]] = {}
        self._numbers = itertools.count()
        self._serving = asyncio.ensure_future(self._serve(ours))

    def take(self, finished: FinishedRun) -> bool:
        """Queue a run; False if there is no room."""
        if self._weight and self._weight + finished.weight > _MAX_WAITING:
            return False
        self._weight += finished.weight
        self._handed += 1
        self._put(finished)
        return True

    def send(self, content: bytes) -> None:
        """Queue a message."""
        self._put(content)

    async def ask(self, operation: str, fields: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Its answer, behind all that waits."""
        number = next(self._numbers)
        answer: asyncio.Future[tuple[dict[str, Any], bytes]]
        answer = asyncio.get_running_loop().create_future()
        self._questions[number] = answer
        self._put(message({"op": operation, "number": number, **fields}))
        try:
            return await answer
        finally:
            del self._questions[number]

    def finish(self) -> None:
        """Let it end when it has written all."""
        self._put(None)

    async def close(self) -> None:
        """The same, awaited."""
        self.finish()
        _, late = await asyncio.wait([self._serving], timeout=_STOP_SECONDS)
        if late:
            self._process.kill()
            self._serving.cancel()
            await asyncio.wait([self._serving])

    def _put(self, item: FinishedRun | bytes | None) -> None:
        self._waiting.append(item)
        self._something.set()

    async def _serve(self, ours: socket.socket) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        feeding = asyncio.ensure_future(self._feed(writer))
        try:
            with contextlib.suppress(OSError, EOFError, protocol.ProtocolError):
                while True:
                    await self._hear(reader)
        finally:
            feeding.cancel()
            writer.transport.abort()
            await asyncio.gather(feeding, return_exceptions=True)
            await asyncio.to_thread(self._process.wait)
            self._recorder.ended(self, self._handed)
            reason = self._recorder.failed or "its writer ended"
            for question in self._questions.values():
                if not question.done():
                    question.set_exception(HistoryUnavailableError(reason))

    async def _feed(self, writer: asyncio.StreamWriter) -> None:
        while True:
            await self._something.wait()
            self._something.clear()
            while self._waiting:
                item = self._waiting.popleft()
                if item is None:
                    writer.write_eof()
                    return
                weight = 0
                if isinstance(item, FinishedRun):
                    weight, item = item.weight, await _encoded(item)
                writer.write(item)
                await writer.drain()
                self._weight -= weight

    async def _hear(self, reader: asyncio.StreamReader) -> None:
        async def frame(limit: int) -> bytes:
            length = protocol.frame_length(await reader.readexactly(4), limit)
            return await reader.readexactly(length)

        document = parse(await frame(protocol.MAX_HEADER))
        content = bytearray()
        while chunk := await frame(protocol.CHUNK):
            content += chunk
        if "number" not in document:
            self._handed -= document["recorded"] + document["lost"]
            self._recorder.heard(document)
            return
        question = self._questions.get(document.pop("number"))
        if question is not None and not question.done():
            question.set_result((document, bytes(content)))


async def _encoded(finished: FinishedRun) -> bytes:
    """The message that hands a run over."""
    if finished.weight > _IN_A_THREAD:
        return await asyncio.to_thread(_encode, finished)
    return _encode(finished)


def _encode(finished: FinishedRun) -> bytes:
    kept = finished.source if len(finished.source) <= MAX_SCRIPT else b""
    return message({"op": "record", "record": _record(finished)}, kept)


def _record(finished: FinishedRun) -> Record:
    run, reply = finished.run, finished.reply
    status: Outcome = reply.status if reply else "cancelled"
    return {
        "run_id": run.run_id,
        "time": _rfc3339(run.run_id),
        "language": run.language,
        "status": status,
        "exit_code": reply.exit_code if reply else None,
        "signal": reply.signal if reply else None,
        "duration_ms": reply.duration_ms if reply else None,
        "cpu_ms": reply.cpu_ms if reply else None,
        "max_rss_bytes": reply.max_rss_bytes if reply else None,
        "timeout": run.timeout,
        "script": _digest(finished.source),
        "args": run.args,
        "env": sorted(run.env),  # names: the values may be secret
        "stdin": _digest(finished.stdin) if run.stdin else None,
        "stdout": _output(finished.stdout, reply.stdout_truncated) if reply else None,
        "stderr": _output(finished.stderr, reply.stderr_truncated) if reply else None,
    }


def _digest(content: bytes) -> Digest:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _output(content: bytes, truncated: bool) -> Output:
    return {**_digest(content), "truncated": truncated}


def _rfc3339(run_id: str) -> str:
    time = datetime.fromtimestamp(milliseconds(run_id) / 1000, timezone.utc)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
