"""The machine the lab runs on: whether it can host, its tools, running its commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.state import CannotHost, LabError, locked

_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}


def say(message: str) -> None:
    print(f"lab: {message}", file=sys.stderr, flush=True)


@contextmanager
def step(message: str) -> Iterator[None]:
    """Say what takes long before it starts, and how long it took."""
    say(f"{message} …")
    started = time.monotonic()
    yield
    say(f"{message}: {time.monotonic() - started:.1f} s")


def run(*command: str | Path, check: bool = True) -> str:
    """Run a command without input and return its output.

    Raises LabError with the command's own last words when it fails (unless ``check`` is false).
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"},
            check=False,
        )
    except FileNotFoundError:
        raise LabError(f"{words[0]} is missing on this machine; install its package") from None
    if check and done.returncode != 0:
        tail = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-15:])
        raise LabError(f"failed with exit code {done.returncode}: {' '.join(words)}\n{tail}")
    return done.stdout


def check_machine() -> None:
    """Raises CannotHost, in one line, when this machine can't run lab hosts. Changes nothing."""
    if os.geteuid() != 0:
        raise CannotHost("lab hosts need root: use sudo, or a machine where you are root")
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise CannotHost("lab hosts need Debian or Ubuntu: here are no apt-get and dpkg")
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text(), re.M)
    held = int(effective[1], 16) if effective else 0
    for name, bit in _CAPABILITIES.items():
        if not held >> bit & 1:
            raise CannotHost(f"root has no {name} here (a plain container?): lab hosts need it")
    release = os.uname().release
    known = Path("/proc/filesystems").read_text().split()
    for filesystem in ("overlay", "cgroup2"):
        if filesystem not in known and not Path("/lib/modules", release).is_dir():
            raise CannotHost(f"the kernel {release} here has no {filesystem}: lab hosts need it")


def need_tools(tools: dict[str, str]) -> None:
    """Install the packages of those commands that are missing (command -> packages), and say so.

    Raises LabError when apt can't.
    """
    with locked("-packages"):  # two labs may come up at once, and apt's lists have no lock that waits
        missing = [packages for command, packages in tools.items() if not shutil.which(command)]
        packages = sorted({package for words in missing for package in words.split()})
        if packages:
            apt = ("apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300")  # seconds: another apt is waited for
            with step(f"installing on this machine with apt: {' '.join(packages)}"):
                run(*apt, "update")
                run(*apt, "install", "--yes", "--no-install-recommends", *packages)


def mounted(path: Path) -> str | None:
    """The source of what is mounted exactly there, the uppermost; None when nothing is."""
    source = None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, filesystem = line.partition(" - ")
        if mount.split()[4] == str(path):
            source = filesystem.split()[1]
    return source


def has_systemd() -> bool:
    """Whether PID 1 of this machine is systemd (the test of sd_booted(3))."""
    return Path("/run/systemd/system").is_dir()


def default_mtu() -> int:
    """The MTU, in bytes, of the interface with the default route; 1500 when there is none."""
    for route in json.loads(run("ip", "-json", "route", "show", "default") or "[]"):
        mtu = Path(f"/sys/class/net/{route.get('dev')}/mtu")
        if mtu.is_file():
            return int(mtu.read_text())
    return 1500
