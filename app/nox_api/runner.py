"""The runner's client: one connection per operation, by the protocol they share."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

from nox_runner import protocol
from nox_runner.protocol import ProtocolError

DEFAULT_SOCKET = "/run/nox-runner.sock"

_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 30.0
# The runner waits for a slot, sets up, kills and buries; then it answers, whatever happened.
_RUN_MARGIN = 30.0

Reply = TypeVar("Reply")


class RunnerUnavailableError(Exception):
    """The runner is not there, or broke off."""


class _Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def receive(self, limit: int) -> bytes:
        length = protocol.frame_length(await self._reader.readexactly(4), limit)
        return await self._reader.readexactly(length)

    async def reply(self, kind: type[Reply]) -> Reply:
        return protocol.decode_reply(await self.receive(protocol.MAX_HEADER), kind)

    async def stream(self) -> AsyncIterator[bytes]:
        while chunk := await self.receive(protocol.CHUNK):
            yield chunk


class _RunAnswer(asyncio.Protocol):
    """Takes a run's answer in. asyncio's streams would do it, in four times the time."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.complete: asyncio.Future[tuple[protocol.RunReply, bytes, bytes]] = loop.create_future()
        self._received = bytearray()
        self._reply: protocol.RunReply | None = None
        self._streams: list[list[bytes]] = [[]]

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._received += data
        try:
            while not self.complete.done() and (payload := self._frame()) is not None:
                self._take(payload)
        except (ProtocolError, protocol.Failure) as error:
            self.complete.set_exception(error)

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio.Protocol."""
        if not self.complete.done():
            self.complete.set_exception(error or EOFError("it closed the connection"))

    def _frame(self) -> bytes | None:
        received = self._received
        if len(received) < protocol.PREFIX:
            return None
        limit = protocol.CHUNK if self._reply else protocol.MAX_HEADER
        end = protocol.PREFIX + protocol.frame_length(received[: protocol.PREFIX], limit)
        if len(received) < end:
            return None
        payload = bytes(received[protocol.PREFIX : end])
        del received[:end]
        return payload

    def _take(self, payload: bytes) -> None:
        if self._reply is None:
            self._reply = protocol.decode_reply(payload, protocol.RunReply)
        elif payload:
            self._streams[-1].append(payload)
        elif len(self._streams) == 1:
            self._streams.append([])
        else:
            stdout, stderr = map(b"".join, self._streams)
            self.complete.set_result((self._reply, stdout, stderr))


class RunnerClient:
    """Every method raises RunnerUnavailableError, or the protocol's Failure.

    Cancelling one closes its connection, by which the runner ends the operation.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    async def health(self, timeout: float) -> protocol.HealthReply:
        """What the runner says of itself, within `timeout` seconds."""
        async with self._connected(timeout) as connection:
            await connection.send(protocol.encode_request(protocol.Health()))
            return await connection.reply(protocol.HealthReply)

    async def run(
        self, request: protocol.Run, source: bytes, stdin: bytes
    ) -> tuple[protocol.RunReply, bytes, bytes]:
        """Run a program; gives the result, stdout and stderr."""
        pieces = [protocol.encode_request(request)]
        for content in (source, stdin):
            pieces += protocol.stream(content)
        loop = asyncio.get_running_loop()
        try:
            connection, rest = _begin(self._path, b"".join(pieces))
            transport, answer = await loop.create_unix_connection(_RunAnswer, sock=connection)
        except OSError as error:
            raise RunnerUnavailableError(f"the runner does not answer: {error}") from error
        timer = loop.call_later(request.timeout + _RUN_MARGIN, transport.abort)
        try:
            if rest:
                transport.write(rest)
            return await answer.complete
        except (OSError, EOFError, ProtocolError) as error:
            raise RunnerUnavailableError(f"the runner broke off: {error}") from error
        finally:
            timer.cancel()
            transport.abort()

    async def put(
        self, path: str, overwrite: bool, content: AsyncIterable[bytes]
    ) -> protocol.PutReply:
        """Store a file; the pieces of `content` are at most protocol.CHUNK bytes long."""
        async with self._connected(_ANSWER_SECONDS) as connection:
            await connection.send(protocol.encode_request(protocol.Put(path, overwrite)))
            async for chunk in content:
                if chunk:
                    await connection.send(protocol.frame(chunk))
            await connection.send(protocol.END)
            return await connection.reply(protocol.PutReply)

    @asynccontextmanager
    async def get(self, path: str) -> AsyncIterator[tuple[protocol.GetReply, AsyncIterator[bytes]]]:
        """A file's size and content, readable while the context lasts."""
        async with self._connected(None) as connection:
            await connection.send(protocol.encode_request(protocol.Get(path)))
            reply = await asyncio.wait_for(connection.reply(protocol.GetReply), _ANSWER_SECONDS)
            yield reply, connection.stream()

    async def list(self) -> protocol.ListReply:
        """The sandbox's files."""
        async with self._connected(_ANSWER_SECONDS) as connection:
            await connection.send(protocol.encode_request(protocol.List()))
            return await connection.reply(protocol.ListReply)

    async def delete(self, path: str) -> None:
        """Remove a file."""
        async with self._connected(_ANSWER_SECONDS) as connection:
            await connection.send(protocol.encode_request(protocol.Delete(path)))
            await connection.reply(protocol.DeleteReply)

    @asynccontextmanager
    async def _connected(self, seconds: float | None) -> AsyncIterator[_Connection]:
        """A connection that is cut after `seconds`, and at the end in any case."""
        try:
            opening = asyncio.open_unix_connection(self._path)
            reader, writer = await asyncio.wait_for(opening, _CONNECT_SECONDS)
        except (OSError, asyncio.TimeoutError) as error:
            raise RunnerUnavailableError(f"the runner does not answer: {error}") from error
        timer = None
        if seconds is not None:
            timer = asyncio.get_running_loop().call_later(seconds, writer.transport.abort)
        try:
            yield _Connection(reader, writer)
        except (OSError, EOFError, ProtocolError) as error:
            raise RunnerUnavailableError(f"the runner broke off: {error}") from error
        finally:
            if timer is not None:
                timer.cancel()
            writer.transport.abort()


def _begin(path: str, data: bytes) -> tuple[socket.socket, bytes]:
    """A new connection on which has been sent of `data` what it takes at once, and the rest.

    So the runner, which wakes up to accept it, need not wait for anything more.
    """
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.setblocking(False)
        connection.connect(path)
        return connection, data[connection.send(data) :]
    except OSError:
        connection.close()
        raise
