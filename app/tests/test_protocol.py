from __future__ import annotations

import contextlib
import json
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nox_runner import protocol
from nox_runner.protocol import Failure, ProtocolError

RUN = protocol.Run("id", "sh", ["a"], {"K": "v"}, 1.5, True, False)


@pytest.mark.parametrize(
    "request_",
    [RUN, protocol.Health(), protocol.Put("a", True), protocol.Get("é"), protocol.List()],
)
def test_requests_survive(request_: protocol.Request) -> None:
    assert protocol.decode_request(protocol.encode_request(request_)[4:]) == request_


def test_replies_survive() -> None:
    reply = protocol.ListReply([protocol.File("a", 1, 2.0)], False)
    assert protocol.decode_reply(protocol.encode_reply(reply)[4:], protocol.ListReply) == reply
    run = protocol.RunReply("ok", 0, None, False, True, 1, 2, 3, None)
    assert protocol.decode_reply(protocol.encode_reply(run)[4:], protocol.RunReply) == run


def test_failures_are_raised() -> None:
    frame = protocol.encode_failure(Failure("exists", "it is there"))
    with pytest.raises(Failure) as caught:
        protocol.decode_reply(frame[4:], protocol.PutReply)
    assert (caught.value.code, caught.value.message) == ("exists", "it is there")


def altered(**changes: object) -> bytes:
    document = json.loads(protocol.encode_request(RUN)[4:])
    return json.dumps({**document, **changes}).encode()


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"x", b"[]", b"{}", b"\xff", b"[" * 100_000, altered(v=2), altered(op="nope"),
        altered(op=[]), altered(timeout=True), altered(timeout="1"), altered(timeout=float("nan")),
        altered(args="ab"), altered(args=[1]), altered(env={"a": 1}), altered(language="perl"),
        altered(more=1), altered(run_id=None),
    ],
)  # fmt: skip
def test_bad_requests(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        protocol.decode_request(payload)


@given(st.binary())
def test_any_bytes_are_a_request_or_an_error(payload: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        protocol.decode_request(payload)


def test_streams_survive() -> None:
    content = bytes(range(256)) * 1000
    near, far = socket.socketpair()
    with near, far:
        pieces = b"".join(protocol.stream(content))
        sender = threading.Thread(target=far.sendall, args=(pieces,))
        sender.start()
        assert b"".join(protocol.receive_stream(near)) == content
        sender.join()


def test_a_long_frame_is_refused_before_it_is_read() -> None:
    near, far = socket.socketpair()
    with near, far:
        far.sendall(b"\xff\xff\xff\xff")
        with pytest.raises(ProtocolError, match="at most"):
            protocol.receive_frame(near, 100)


def test_a_cut_frame() -> None:
    near, far = socket.socketpair()
    with near:
        far.sendall(b"\0\0\0\x05abc")
        far.close()
        with pytest.raises(ProtocolError, match="closed"):
            protocol.receive_frame(near, 100)
