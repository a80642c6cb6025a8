"""`python -m nox_api.history`: the process that writes the history, and reads it for the front.

The front starts it, hands it one end of a socket pair, and ends it by closing the other. It has one
thread: while it commits, messages wait in the socket, and behind it in the front's bounded queue.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import socket
import sys
import time
from typing import Any

from nox_api.history.prose import Run
from nox_api.history.record import message, parse
from nox_api.history.repository import Repository, RepositoryError
from nox_runner import protocol

_GATHER = 1.0
"""Seconds in which runs gather to be one commit."""
_MOST_RUNS = 500
_MOST_BYTES = 8 << 20
_HOUSEKEEPING = 3600.0


class _Writer:
    def __init__(self, front: socket.socket, repository: Repository) -> None:
        self._front = front
        self._repository = repository
        self._pending: list[Run] = []
        self._bytes = 0
        self._due = 0.0
        self._housekeeping = 0.0

    def serve(self) -> None:
        """Until the front closes its end."""
        try:
            self._keep_house()
            while self._next():
                pass
        finally:
            self._commit()

    def _next(self) -> bool:
        until = self._due if self._pending else self._housekeeping
        readable, _, _ = select.select([self._front], [], [], max(0.0, until - time.monotonic()))
        if readable:
            try:
                received = protocol.receive_frame(self._front, protocol.MAX_HEADER)
                content = b"".join(protocol.receive_stream(self._front))
            except protocol.ProtocolError:
                return False
            self._handle(parse(received), content)
        now = time.monotonic()
        full = len(self._pending) >= _MOST_RUNS or self._bytes >= _MOST_BYTES
        if self._pending and (full or now >= self._due):
            self._commit()
        if now >= self._housekeeping:
            self._keep_house()
        return True

    def _handle(self, asked: dict[str, Any], content: bytes) -> None:
        operation = asked.pop("op")
        if operation == "record":
            if not self._pending:
                self._due = time.monotonic() + _GATHER
            self._pending.append((asked["record"], content))
            self._bytes += len(content)
        elif operation == "limits":
            self._repository.days, self._repository.size = asked["days"], asked["size"]
            self._keep_house()
        else:
            # What was handed over before the question is in the answer.
            self._commit()
            try:
                answer, script = self._answer(operation, asked)
            except (OSError, KeyError, ValueError) as error:
                answer, script = {"failed": _reason(error)}, b""
            self._say({"number": asked["number"], **answer}, script)

    def _answer(self, operation: str, asked: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        if operation == "list":
            found = self._repository.page(
                asked["low"], asked["high"], asked["status"], asked["limit"]
            )
            return {"runs": found.runs, "next": found.next}, b""
        known = self._repository.get(asked["run_id"])
        if known is None:
            return {"record": None, "has_script": False}, b""
        record, script = known
        return {"record": record, "has_script": script is not None}, script or b""

    def _commit(self) -> None:
        runs, self._pending, self._bytes = self._pending, [], 0
        if not runs:
            return
        try:
            self._repository.add(runs)
        except (OSError, KeyError, ValueError, RepositoryError) as error:
            self._state(lost=len(runs), failed=_reason(error))
        else:
            self._state(recorded=len(runs))

    def _keep_house(self) -> None:
        self._housekeeping = time.monotonic() + _HOUSEKEEPING
        try:
            self._repository.forget()
        except (OSError, KeyError, ValueError, RepositoryError) as error:
            self._state(failed=_reason(error))
        else:
            self._state()

    def _state(self, recorded: int = 0, lost: int = 0, failed: str = "") -> None:
        used = self._repository.used
        self._say({"recorded": recorded, "lost": lost, "failed": failed, "bytes": used}, b"")

    def _say(self, document: dict[str, Any], content: bytes) -> None:
        # A front that is gone hears nothing; what it handed over is committed all the same.
        with contextlib.suppress(OSError):
            self._front.sendall(message(document, content))


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or 'the history'}: {error.strerror}"
    return str(error) if isinstance(error, RepositoryError) else f"it is damaged: {error!r}"


def main() -> int:
    """Exit code 0 after the front closed its end, 1 if the repository cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m nox_api.history", description=__doc__)
    parser.add_argument("--path", required=True, metavar="DIR")
    parser.add_argument("--descriptor", required=True, type=int, metavar="N")
    parser.add_argument("--days", required=True, type=int)
    parser.add_argument("--size", required=True, type=int, metavar="BYTES")
    arguments = parser.parse_args()
    # The end is the front's to tell: it does so after its last run.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # Runs come first; where the unit's filter forbids it, they must do without.
    with contextlib.suppress(OSError):
        os.nice(10)
    front = socket.socket(fileno=arguments.descriptor)
    try:
        repository = Repository(arguments.path, arguments.days, arguments.size)
    except (OSError, KeyError, ValueError, RepositoryError) as error:
        failed = {"recorded": 0, "lost": 0, "failed": _reason(error), "bytes": 0}
        front.sendall(message(failed))
        return 1
    _Writer(front, repository).serve()
    repository.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
