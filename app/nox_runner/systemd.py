"""The two systemd protocols in use: readiness notification and socket activation.

Both are a few bytes over inherited means, so no library is needed. Without systemd every
function here does nothing.
"""

from __future__ import annotations

import os
import socket
import time

_FIRST_PASSED_DESCRIPTOR = 3


def notify(*fields: str) -> None:
    """Send `KEY=value` fields to the service manager, if there is one. Never raises."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto("\n".join(fields).encode(), address)
    except OSError:
        pass  # a deaf manager must not stop the service


def ready() -> None:
    """The service can be used."""
    notify("READY=1")


def reloading() -> None:
    """The configuration is being re-read; follow with `ready`."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def stopping(drain: float) -> None:
    """The service stops, and may need `drain` seconds more for work that runs."""
    notify("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int(drain * 1_000_000)}")


def passed_socket() -> socket.socket | None:
    """The one listening socket that systemd passed, or None. ValueError if it passed several."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = os.environ.get("LISTEN_FDS", "")
    if count != "1":
        raise ValueError(f"systemd passed {count or 'no'} sockets, one is wanted")
    passed = socket.socket(fileno=_FIRST_PASSED_DESCRIPTOR)
    passed.set_inheritable(False)
    return passed
