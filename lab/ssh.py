"""Reaching a host: its ssh command line, whether its server answers, which boot it is in."""

from __future__ import annotations

import selectors
import socket
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress

from lab.inventory import KNOWN_HOSTS
from lab.state import Host, Lab


def command(lab: Lab, host: Host) -> list[str]:
    """The ssh command line for root on a host: the lab's key and pinned host keys, nothing else."""
    options = {
        "UserKnownHostsFile": str(lab.dir / "inventory" / KNOWN_HOSTS),
        "GlobalKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "yes",
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "ConnectTimeout": "5",
        "LogLevel": "ERROR",
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    return ["ssh", "-F", "/dev/null", "-i", str(lab.key), *words, f"root@{host.address}"]


def output(lab: Lab, host: Host, *remote: str) -> str:
    """What a command prints on a host; empty when ssh doesn't answer."""
    done = subprocess.run(
        [*command(lab, host), *remote],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip()


def boot_id(lab: Lab, host: Host) -> str:
    """What the host's kernel calls its present boot; empty when ssh doesn't answer."""
    return output(lab, host, "cat", "/proc/sys/kernel/random/boot_id")


def answering(addresses: Iterable[str], port: int = 22, timeout: float = 0.25) -> set[str]:
    """Those of the addresses where an ssh server sends its banner within ``timeout`` seconds.

    Rounds of fresh connections see a booting host sooner than one long attempt, which repeats
    itself after 1, 2 and 4 seconds.
    """
    found: set[str] = set()
    end = time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        for address in addresses:
            connection = socket.socket()
            connection.setblocking(False)
            connection.connect_ex((address, port))
            selector.register(connection, selectors.EVENT_READ, (address, connection))
        while selector.get_map() and time.monotonic() < end:
            for key, _ in selector.select(max(0.0, end - time.monotonic())):
                address, connection = key.data
                selector.unregister(connection)
                with suppress(OSError), connection:
                    if connection.recv(4) == b"SSH-":
                        found.add(address)
        for key in selector.get_map().values():
            key.data[1].close()
    return found
