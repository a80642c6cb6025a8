"""The systemd protocols in use: readiness notification, socket activation, descriptor store.

All are a few bytes over inherited means, so no library is needed. Without systemd every
function here does nothing.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Sequence

_FIRST_PASSED_DESCRIPTOR = 3
_MOST_AT_ONCE = 200  # descriptors in one message; the kernel's own limit is 253
_BARRIER_SECONDS = 5.0


def notify(*fields: str, descriptors: Sequence[int] = ()) -> bool:
    """Send `KEY=value` fields to the service manager; False if there is none. Never raises."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.connect(address)
            socket.send_fds(channel, ["\n".join(fields).encode()], list(descriptors))
    except OSError:
        return False  # a deaf manager must not stop the service
    return True


def ready() -> None:
    """The service can be used."""
    notify("READY=1")


def reloading() -> None:
    """The configuration is being re-read; follow with `ready`."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")


def stopping(drain: float) -> None:
    """The service stops, and may need `drain` seconds more for work that runs."""
    notify("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int(drain * 1_000_000)}")


def store(name: str, descriptors: Sequence[int]) -> bool:
    """Have the manager keep open sockets for the service's next start; False if it cannot.

    It needs FileDescriptorStoreMax= in the unit; what exceeds that is closed. It keeps them over a
    restart and a crash, and closes them when the service is stopped.
    """
    return all(
        notify("FDSTORE=1", f"FDNAME={name}", descriptors=descriptors[at : at + _MOST_AT_ONCE])
        for at in range(0, len(descriptors), _MOST_AT_ONCE)
    )


def forget(name: str) -> None:
    """Have the manager close its copies of what was stored under `name`."""
    notify("FDSTOREREMOVE=1", f"FDNAME={name}")


def settle() -> None:
    """Wait until the manager has read all that was sent; a process that ends may need to."""
    ours, theirs = os.pipe()
    try:
        sent = notify("BARRIER=1", descriptors=[theirs])
    finally:
        os.close(theirs)
    if sent:
        waiting = select.poll()
        waiting.register(ours, 0)  # only its hang-up: the manager closes the other end
        waiting.poll(_BARRIER_SECONDS * 1000)
    os.close(ours)


def passed_socket() -> socket.socket | None:
    """The one listening socket that systemd passed, or None. ValueError if it passed several."""
    passed = passed_sockets()
    if len(passed) > 1:
        raise ValueError(f"systemd passed {len(passed)} sockets, one is wanted")
    return passed[0][1] if passed else None


def passed_sockets() -> list[tuple[str, socket.socket]]:
    """Every socket that systemd passed, with its name; to be called once."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    passed = []
    for at in range(int(os.environ.get("LISTEN_FDS", "0"))):
        found = socket.socket(fileno=_FIRST_PASSED_DESCRIPTOR + at)
        found.set_inheritable(False)
        passed.append((names[at] if at < len(names) else "unknown", found))
    return passed
