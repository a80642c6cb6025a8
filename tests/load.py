"""Constant load on a living Nox, every request counted: python tests/load.py --url https://… [--ca FILE] [--seconds N]

The token is read from the environment, NOX_TOKEN. Ends after --seconds, or at SIGTERM, when each worker has had its last
answer. Prints one JSON object: requests, per status, per error, the slowest answer, and the first failures in words.
Exit codes: 0 every request had the answer it should have, 1 some had not, 2 usage.

Half of the workers keep their connection, as browsers and SDKs do; the others make a new one for each request, as curl does.
A kept connection that the server closes between two requests is opened again, as HTTP asks (RFC 9112, 9.3.1), but a request
that was sent and not answered is an error, never repeated.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import ssl
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from urllib.parse import urlsplit

PATIENCE = 90.0  # seconds for one answer: a run may wait for a service that is being replaced


@dataclass(frozen=True)
class Request:
    """One kind of request, and the status it should have."""

    method: str
    path: str
    body: bytes = b""
    status: int = 200


def kinds() -> list[Request]:
    """What clients do, in turn. Runs have to give their own answer, see `answered`."""
    return [
        Request("POST", "/run_py", json.dumps({"code": "print(6 * 7)"}).encode()),
        Request("GET", "/health"),
        Request("POST", "/run_sh", json.dumps({"cmd": "sleep 0.2; echo 42"}).encode()),
        Request("GET", "/files"),
        Request("POST", "/run_py", json.dumps({"code": "x" * 20 + " = 1; print(42)"}).encode()),
    ]


def answered(request: Request, status: int, body: bytes) -> bool:
    """Whether this is the answer to that request."""
    if status != request.status:
        return False
    return not request.path.startswith("/run_") or json.loads(body)["stdout"] == "42\n"


@dataclass
class Count:
    """What came of all requests."""

    requests: int = 0
    failed: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    reopened: int = 0
    slowest: float = 0.0
    examples: list[str] = field(default_factory=list)

    def fail(self, text: str) -> None:
        self.failed += 1
        if len(self.examples) < 5:
            self.examples.append(text)


class Worker:
    """Sends one request after the other, and waits for each answer."""

    def __init__(self, url: str, ca: str, token: str, count: Count, keep: bool) -> None:
        parts = urlsplit(url)
        self.host = parts.hostname or ""
        self.tls = ssl.create_default_context(cafile=ca or None) if parts.scheme == "https" else None
        self.port = parts.port or (443 if self.tls else 80)
        self.token, self.count, self.keep = token, count, keep
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def run(self, stop: asyncio.Event, offset: int, pause: float) -> None:
        requests = kinds()
        while not stop.is_set():
            request = requests[offset % len(requests)]
            offset += 1
            began = time.monotonic()
            self.count.requests += 1
            try:
                status, body = await asyncio.wait_for(self.ask(request), PATIENCE)
                self.count.statuses[str(status)] += 1
                if not answered(request, status, body):
                    self.count.fail(f"{request.method} {request.path}: {status} {body[:200]!r}")
            except (OSError, EOFError, ValueError, asyncio.TimeoutError) as error:
                self.count.errors[type(error).__name__] += 1
                self.count.fail(f"{request.method} {request.path}: {error!r}")
                self.close()
                await asyncio.sleep(0.05)
            self.count.slowest = max(self.count.slowest, time.monotonic() - began)
            await asyncio.sleep(pause)
        self.close()

    async def ask(self, request: Request) -> tuple[int, bytes]:
        reader, writer = await self.connected()
        head = (
            f"{request.method} {request.path} HTTP/1.1\r\nHost: {self.host}\r\nAuthorization: Bearer {self.token}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(request.body)}\r\n"
            f"Connection: {'keep-alive' if self.keep else 'close'}\r\n\r\n"
        )
        writer.write(head.encode() + request.body)
        await writer.drain()
        status_line, *fields = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in fields)}
        body = await self.body(reader, headers)
        if not self.keep or headers.get("connection", "").lower() == "close":
            self.close()
        return int(status_line.split()[1]), body

    async def body(self, reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
        if "chunked" not in headers.get("transfer-encoding", ""):
            return await reader.readexactly(int(headers["content-length"]))
        pieces = []
        while size := int(await reader.readuntil(b"\r\n"), 16):
            pieces.append((await reader.readexactly(size + 2))[:-2])
        await reader.readuntil(b"\r\n")
        return b"".join(pieces)

    async def connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.streams and self.streams[0].at_eof():
            self.count.reopened += 1
            self.close()
        if not self.streams:
            self.streams = await asyncio.open_connection(
                self.host, self.port, ssl=self.tls, server_hostname=self.host if self.tls else None
            )
        return self.streams

    def close(self) -> None:
        if self.streams:
            self.streams[1].close()
        self.streams = None


async def load(arguments: argparse.Namespace) -> Count:
    count, stop = Count(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if arguments.seconds:
        loop.call_later(arguments.seconds, stop.set)
    token = os.environ["NOX_TOKEN"]
    workers = [
        Worker(arguments.url, arguments.ca, token, count, keep=number % 2 == 0) for number in range(arguments.workers)
    ]
    await asyncio.gather(*(worker.run(stop, number, arguments.pause) for number, worker in enumerate(workers)))
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--ca", default="", metavar="FILE", help="PEM file to verify with; default: the system's")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0, help="0: until SIGTERM")
    parser.add_argument("--pause", type=float, default=0.01, help="seconds between a worker's requests")
    arguments = parser.parse_args()
    if not os.environ.get("NOX_TOKEN"):
        parser.error("NOX_TOKEN is not set")
    count = asyncio.run(load(arguments))
    told = {**vars(count), "slowest": round(count.slowest, 2)}
    print(json.dumps(told))
    return 1 if count.failed or not count.requests else 0


if __name__ == "__main__":
    sys.exit(main())
