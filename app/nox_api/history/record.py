"""What is kept of a run, and the messages between the front and the process that writes it."""

from __future__ import annotations

import json
import os
import time
from typing import Any, Literal, TypedDict

from nox_runner import protocol
from nox_runner.protocol import Language, Status

MAX_SCRIPT = 16 << 20
"""Bytes; of a longer script only size and digest are kept."""

_ID_DIGITS = 32
_TIME_DIGITS = 12

Outcome = Status | Literal["cancelled"]
OUTCOMES = ("ok", "error", "timeout", "memory_limit", "output_limit", "sandbox_error", "cancelled")


class Digest(TypedDict):
    """Stands for content that is not kept."""

    bytes: int
    sha256: str


class Output(Digest):
    """Of what the client was given."""

    truncated: bool


class Record(TypedDict):
    """All that is kept of a run beside its script. No value of its environment, no input."""

    run_id: str
    time: str
    language: Language
    status: Outcome
    exit_code: int | None
    signal: int | None
    duration_ms: int | None
    cpu_ms: int | None
    max_rss_bytes: int | None
    timeout: float
    script: Digest
    args: list[str]
    env: list[str]
    stdin: Digest | None
    stdout: Output | None
    stderr: Output | None


def new_run_id() -> str:
    """32 hexadecimal digits that sort by time: a UUID of version 7.

    The history finds a run's place by them, without an index.
    """
    noise = int.from_bytes(os.urandom(10), "big")
    number = time.time_ns() // 1_000_000 << 80 | 7 << 76 | (noise >> 64 & 0xFFF) << 64
    number |= 0b10 << 62 | noise & (1 << 62) - 1
    return f"{number:0{_ID_DIGITS}x}"


def is_run_id(text: str) -> bool:
    """Whether `text` has the form of one."""
    return len(text) == _ID_DIGITS and all(digit in "0123456789abcdef" for digit in text)


def milliseconds(run_id: str) -> int:
    """When the run was asked for, since the epoch."""
    return int(run_id[:_TIME_DIGITS], 16)


def first_id(milliseconds: int) -> str:
    """What no run id of that time or later sorts before."""
    bounded = min(max(milliseconds, 0), (1 << 48) - 1)
    return f"{bounded:0{_TIME_DIGITS}x}".ljust(_ID_DIGITS, "0")


def parse(payload: bytes) -> dict[str, Any]:
    """The document of a header frame; ProtocolError if it holds none."""
    try:
        document = json.loads(payload)
    except ValueError:
        raise protocol.ProtocolError("a header that is not JSON") from None
    if not isinstance(document, dict):
        raise protocol.ProtocolError("a header that is no object")
    return document


def message(document: dict[str, Any], content: bytes = b"") -> bytes:
    """`document` as a header frame, `content` as a stream after it: see nox_runner.protocol."""
    header = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    return b"".join((protocol.frame(header), *protocol.stream(content)))
