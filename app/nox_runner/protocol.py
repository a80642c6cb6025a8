"""What the front and the runner say to each other: one operation per connection.

Every message is a frame: its length in 4 bytes, big-endian, then that many bytes. A header frame
holds one JSON object with the version `v` and the fields of one of the dataclasses below. A stream
is any number of frames of raw bytes, ended by a frame of length zero.

    operation  request                          reply
    health     Health                           HealthReply
    run        Run, stream code, stream stdin   RunReply, stream stdout, stream stderr
    put        Put, stream content              PutReply
    get        Get                              GetReply, stream content
    list       List                             ListReply
    delete     Delete                           DeleteReply

Instead of its reply any operation may be answered by Failure. The client keeps its side open until
it has the reply: closing it earlier cancels the operation, and kills a run.
A peer that sends anything else gets Failure("protocol", …) if possible, and the connection ends.
"""

from __future__ import annotations

import functools
import json
import socket
import struct
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, Literal, TypeVar

VERSION = 1
MAX_HEADER = 8 << 20
"""Bytes of a header frame; the longest is a listing."""
CHUNK = 64 << 10
"""Bytes of a stream's frame, at most."""

_LENGTH = struct.Struct("!I")
PREFIX = _LENGTH.size
"""Bytes of a frame's length, in front of it."""

Language = Literal["python", "sh"]
Status = Literal["ok", "error", "timeout", "memory_limit", "output_limit", "sandbox_error"]
Code = Literal[
    "protocol",  # malformed request
    "bad_path",  # breaks a rule of paths.py
    "not_found",
    "exists",
    "not_regular",  # a link, directory, device or other special file is in the way
    "not_empty",  # a directory that has entries
    "denied",  # the file's own permissions
    "too_large",
    "no_space",  # disk or quota full
    "busy",  # no slot or thread became free in time
    "unable",  # the sandbox does not work on this host
    "internal",
]


class ProtocolError(Exception):
    """The peer broke the protocol, or went away in the middle of a message."""


@dataclass(frozen=True)
class Health:
    op: ClassVar[str] = "health"


@dataclass(frozen=True)
class Run:
    """`timeout` in seconds, cut to the runner's own; `files` asks which files the run changed."""

    op: ClassVar[str] = "run"
    run_id: str
    language: Language
    args: list[str]
    env: dict[str, str]
    timeout: float
    stdin: bool
    """Whether there is a standard input; if not, its stream is empty and the run has /dev/null."""
    files: bool


@dataclass(frozen=True)
class Put:
    op: ClassVar[str] = "put"
    path: str
    overwrite: bool


@dataclass(frozen=True)
class Get:
    op: ClassVar[str] = "get"
    path: str


@dataclass(frozen=True)
class List:
    op: ClassVar[str] = "list"


@dataclass(frozen=True)
class Delete:
    op: ClassVar[str] = "delete"
    path: str


Request = Health | Run | Put | Get | List | Delete
_REQUESTS: dict[str, type[Request]] = {
    kind.op: kind for kind in (Health, Run, Put, Get, List, Delete)
}


@dataclass(frozen=True)
class File:
    """A regular file of the sandbox: relative path, bytes, seconds since the epoch."""

    path: str
    size: int
    mtime: float


@dataclass(frozen=True)
class SandboxUsage:
    """What the sandbox holds, and its quota; `files` counts directories and links, too."""

    bytes: int
    files: int
    quota_bytes: int
    quota_files: int


@dataclass(frozen=True)
class HealthReply:
    """`able` is false when the sandbox does not work, with the `reason`; times in seconds."""

    able: bool
    reason: str
    backend: str
    version: str
    slots_used: int
    slots_total: int
    sandbox: SandboxUsage
    enforced: dict[str, str]
    not_enforced: dict[str, str]


@dataclass(frozen=True)
class RunReply:
    """What became of a run; the meaning of each field is in `outcome.Outcome`."""

    status: Status
    exit_code: int | None
    signal: int | None
    stdout_truncated: bool
    stderr_truncated: bool
    duration_ms: int
    cpu_ms: int
    max_rss_bytes: int
    files: list[File] | None


@dataclass(frozen=True)
class PutReply:
    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class GetReply:
    size: int
    mtime: float


@dataclass(frozen=True)
class ListReply:
    files: list[File]
    truncated: bool


@dataclass(frozen=True)
class DeleteReply:
    path: str


@dataclass(eq=False)  # not frozen: an exception's traceback is assigned to
class Failure(Exception):  # noqa: N818  # a message of the protocol, too
    """The operation was refused or failed; `message` is for people and holds no secret."""

    code: Code
    message: str


Reply = HealthReply | RunReply | PutReply | GetReply | ListReply | DeleteReply
Message = TypeVar("Message")


def frame(payload: bytes) -> bytes:
    """One frame."""
    return _LENGTH.pack(len(payload)) + payload


END = frame(b"")
"""Ends a stream."""


def frame_length(prefix: bytes | bytearray, limit: int) -> int:
    """The length that a frame's first 4 bytes tell; ProtocolError above `limit`."""
    (length,) = _LENGTH.unpack(prefix)
    if length > limit:
        raise ProtocolError(f"a frame of {length} bytes, at most {limit} are allowed")
    return int(length)


def stream(content: bytes) -> Iterator[bytes]:
    """The frames of `content` as a stream."""
    view = memoryview(content)
    for start in range(0, len(view), CHUNK):
        yield frame(view[start : start + CHUNK].tobytes())
    yield END


def encode_request(request: Request) -> bytes:
    """The header frame of `request`."""
    return _header({"op": request.op, **vars(request)})


def decode_request(payload: bytes) -> Request:
    """The request in a header frame's payload."""
    document = _document(payload)
    op = document.pop("op", None)
    kind = _REQUESTS.get(op) if isinstance(op, str) else None
    if kind is None:
        raise ProtocolError("unknown operation")
    return _build(kind, document)  # type: ignore[no-any-return]


def encode_reply(reply: Reply) -> bytes:
    """The header frame of `reply`."""
    return _header({"ok": True, **vars(reply)})


def encode_failure(failure: Failure) -> bytes:
    """The header frame of `failure`."""
    return _header({"ok": False, "code": failure.code, "message": failure.message})


def decode_reply(payload: bytes, kind: type[Message]) -> Message:
    """The reply of type `kind` in a header frame's payload; raises Failure if it holds one."""
    document = _document(payload)
    if document.pop("ok", None) is not True:
        failure: Failure = _build(Failure, document)
        raise failure
    return _build(kind, document)  # type: ignore[no-any-return]


def receive_frame(connection: socket.socket, limit: int) -> bytes:
    """Read one frame's payload from a blocking socket; ProtocolError at its end or timeout."""
    return _receive(connection, frame_length(_receive(connection, _LENGTH.size), limit))


def receive_stream(connection: socket.socket) -> Iterator[bytes]:
    """Read a stream's chunks from a blocking socket, up to its end."""
    while chunk := receive_frame(connection, CHUNK):
        yield chunk


def _receive(connection: socket.socket, count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        try:
            piece = connection.recv(min(count - len(received), 1 << 20))
        except OSError as error:
            raise ProtocolError(f"the peer cannot be heard: {error}") from None
        if not piece:
            raise ProtocolError("the peer closed in the middle of a message")
        received += piece
    return bytes(received)


def _header(document: dict[str, Any]) -> bytes:
    return frame(_ENCODER.encode({"v": VERSION, **document}).encode("utf-8"))


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


# Made once: json.dumps and json.loads with options make them for each call.
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=vars)
_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _document(payload: bytes) -> dict[str, Any]:
    try:
        document = _DECODER.decode(payload.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ProtocolError("a header that is not JSON") from None
    if not isinstance(document, dict) or document.pop("v", None) != VERSION:
        raise ProtocolError(f"a header that is not of version {VERSION}")
    return document


def _build(kind: type[Any], document: dict[str, Any]) -> Any:
    checks = _checks(kind)  # type: ignore[arg-type]
    if document.keys() != checks.keys():
        raise ProtocolError(f"{kind.__name__} has the fields {list(checks)}")
    return kind(**{name: check(document[name], name) for name, check in checks.items()})


Check = Callable[[Any, str], Any]
"""Gives a field's value if it has the right type, with nested dataclasses built."""


@functools.cache
def _checks(kind: type[Any]) -> dict[str, Check]:
    """Of a dataclass, by field. Made once: to look at types takes longer than to check values."""
    hints = typing.get_type_hints(kind)
    return {field.name: _check(hints[field.name]) for field in fields(kind)}


def _check(hint: Any) -> Check:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        inner = _check(next(a for a in arguments if a is not type(None)))
        return lambda value, name: None if value is None else inner(value, name)
    if origin is list:
        item = _check(arguments[0])
        return lambda value, name: [item(each, name) for each in _typed(value, list, name)]
    if origin is dict:
        key, item = _check(arguments[0]), _check(arguments[1])
        return lambda value, name: {
            key(k, name): item(v, name) for k, v in _typed(value, dict, name).items()
        }
    if origin is Literal:
        return lambda value, name: _one_of(value, arguments, name)
    if is_dataclass(hint):
        nested = typing.cast("type[Any]", hint)
        return lambda value, name: _build(nested, _typed(value, dict, name))
    if hint is float:
        return lambda value, name: float(_typed(value, int if type(value) is int else float, name))
    return lambda value, name: _typed(value, hint, name)


def _typed(value: Any, kind: type[Any], name: str) -> Any:
    # `type() is` and not isinstance: True is no number here.
    if type(value) is not kind:
        raise ProtocolError(f"the field {name!r} has a wrong type")
    return value


def _one_of(value: Any, choices: tuple[str, ...], name: str) -> Any:
    if type(value) is not str or value not in choices:
        raise ProtocolError(f"the field {name!r} has a wrong type")
    return value
