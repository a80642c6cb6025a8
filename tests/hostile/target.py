"""The Nox under attack, as its clients see it; and its host, where a command reaches it."""

from __future__ import annotations

import http.client
import json
import shlex
import socket
import ssl
import subprocess
import time
import urllib.parse
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

PREFIX = "hostile-"
"""Of every name that the suite leaves in the sandbox."""


class Failed(Exception):
    """The outcome is not the expected one; the message says what it was."""


class NotEnforced(Exception):
    """The service says itself that it can't enforce this limit on this host; the message says why."""


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found


class Target:
    """`ca` is a PEM file, or None for the system's."""

    def __init__(self, url: str, token: str, ca: str | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        self.name = parts.hostname or ""
        self.is_tls = parts.scheme == "https"
        self.port = parts.port or (443 if self.is_tls else 80)
        self.token = token
        self._tls = ssl.create_default_context(cafile=ca) if self.is_tls else None

    def connect(self, timeout: float = 60) -> http.client.HTTPConnection:
        if self._tls:
            return http.client.HTTPSConnection(self.name, self.port, timeout=timeout, context=self._tls)
        return http.client.HTTPConnection(self.name, self.port, timeout=timeout)

    def request(
        self,
        method: str,
        path: str,
        body: bytes | Iterable[bytes] | None = None,
        headers: dict[str, str] | None = None,
        timeout: float = 60,
    ) -> Answer:
        """One request with the token, on a connection of its own."""
        connection = self.connect(timeout)
        try:
            given = {"Authorization": f"Bearer {self.token}", **(headers or {})}
            is_chunked = body is not None and not isinstance(body, bytes)
            # An answer may come before all is sent, and the connection be closed at that.
            with suppress(BrokenPipeError, ConnectionResetError, ssl.SSLEOFError):
                connection.request(method, path, body, given, encode_chunked=is_chunked)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def post(self, path: str, fields: dict[str, Any], timeout: float = 60) -> Answer:
        headers = {"Content-Type": "application/json"}
        return self.request("POST", path, json.dumps(fields).encode(), headers, timeout)

    def python(self, code: str, **fields: Any) -> dict[str, Any]:
        return self._run("/run_py", {"code": code, **fields})

    def shell(self, cmd: str, **fields: Any) -> dict[str, Any]:
        return self._run("/run_sh", {"cmd": cmd, **fields})

    def _run(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        answer = self.post(path, fields)
        if answer.status != 200:
            raise Failed(f"{path}: {answer.status} {answer.body[:200]!r}")
        return answer.json()

    def put(self, path: str, content: bytes, overwrite: bool = False) -> Answer:
        boundary = uuid.uuid4().hex
        fields = {"path": path, "overwrite": str(overwrite).lower()}
        form = "".join(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in fields.items()
        )
        form += f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        body = form.encode() + content + f"\r\n--{boundary}--\r\n".encode()
        return self.request("POST", "/put", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})

    def size_of(self, path: str) -> int:
        """Bytes of a file of the sandbox; -1 if there is none."""
        answer = self.request("GET", f"/files/{path}")
        return len(answer.body) if answer.status == 200 else -1

    def files(self) -> list[str]:
        return sorted(file["path"] for file in self.request("GET", "/files").json()["files"])

    def health(self) -> dict[str, Any]:
        answer = self.request("GET", "/health", timeout=10)
        if answer.status != 200:
            raise Failed(f"/health: {answer.status}")
        return answer.json()

    @cached_property
    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = self.health()["settings"]
        return found

    def raw(self, data: bytes) -> bytes:
        """Send bytes as they are; the head of the answer."""
        with socket.create_connection((self.name, self.port), 20) as plain:
            connection = self._tls.wrap_socket(plain, server_hostname=self.name) if self._tls else plain
            with connection:
                connection.sendall(data)
                return connection.recv(65536)


_INSPECT = """
ps -u nox -o pid= | wc -l
find /dev/shm -mindepth 1 -user nox 2>/dev/null | wc -l
ipcs -m 2>/dev/null | grep -c ' nox '
find /tmp /var/tmp /run -user nox -name '*{prefix}*' 2>/dev/null | wc -l
ls /etc/cron.d/{prefix}x 2>/dev/null | wc -l
ps -u nox-api -o rss= | awk '{{ sum += $1 }} END {{ print int(sum / 131072) }}'
"""
_WHAT = (
    "processes of nox",
    "files in /dev/shm",
    "shared memory segments",
    "temporary files",
    "files in /etc/cron.d",
    "times 128 MiB of memory in the front",
)


class Host:
    """`command` is what runs a line of shell on the host as root, such as `ssh root@host`."""

    def __init__(self, command: str) -> None:
        self._command = shlex.split(command)
        self._idle = self._count()

    def _count(self) -> list[int]:
        script = _INSPECT.format(prefix=PREFIX)
        told = subprocess.run([*self._command, script], capture_output=True, text=True, timeout=60, check=False)
        counts = [int(line) for line in told.stdout.split() if line.isdigit()]
        if len(counts) != len(_WHAT):
            raise Failed(f"the host does not tell what runs there: {told.stderr.strip()[-200:]}")
        return counts

    def left(self, patience: float = 5) -> str:
        """What is there beyond what was in the beginning; empty if nothing is."""
        end = time.monotonic() + patience
        while True:
            found = zip(_WHAT, self._count(), self._idle, strict=True)
            more = [f"{now - before} more {what}" for what, now, before in found if now > before]
            if not more or time.monotonic() > end:
                return ", ".join(more)
            time.sleep(0.3)
