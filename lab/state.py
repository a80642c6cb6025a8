"""What the lab remembers between commands: labs, their hosts, and whose process is whose."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

STATE = Path("/var/lib/nox-lab")
CACHE = Path("/var/cache/nox-lab")

KINDS = ("nspawn", "uml")
MAX_HOSTS = 100
FIRST_ADDRESS = 11  # the last octet of a lab's first host; .1 is the gateway
# 24 characters: a lab's and a host's together make a host name (64 at most), and the path of a
# socket in the host's directory (107 at most).
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,22}[a-z0-9])?")


class LabError(Exception):
    """Something failed: the message names the thing, the cause and what helps. Exit code 1."""


class CannotHost(LabError):
    """This machine can't run lab hosts at all. Exit code 4."""


def valid_name(name: str) -> bool:
    """Whether a lab or host may be called this: a lower-case DNS label, at most 24 characters."""
    return _NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class Host:
    """One host. ``address`` is IPv4 without a prefix length, ``base`` the path it stands on."""

    name: str
    lab: str
    kind: str
    suite: str
    address: str
    base: str

    @property
    def dir(self) -> Path:
        return STATE / self.lab / "hosts" / self.name

    @property
    def root(self) -> Path:
        """Where an nspawn host's merged file system is mounted."""
        return self.dir / "root"

    @property
    def console(self) -> Path:
        return self.dir / "console.log"

    @property
    def machine(self) -> str:
        """The name that is unique on this machine."""
        return f"{self.lab}-{self.name}"


@dataclass
class Lab:
    """A named set of hosts with a bridge and a /24 of its own: ``10.77.<index>.0/24``.

    ``inventory`` is the directory outside of the lab's own that holds its inventory.
    """

    name: str
    index: int
    hosts: dict[str, Host] = field(default_factory=dict)
    inventory: str | None = None

    @property
    def dir(self) -> Path:
        return STATE / self.name

    @property
    def key(self) -> Path:
        """The private ssh key that opens every host of the lab."""
        return self.dir / "id_ed25519"

    @property
    def bridge(self) -> str:
        return bridge_name(self.index)

    @property
    def subnet(self) -> str:
        return f"10.77.{self.index}.0/24"

    @property
    def gateway(self) -> str:
        return f"10.77.{self.index}.1"

    def free_address(self) -> str:
        """The lowest address no host of this lab holds.

        Raises LabError when all MAX_HOSTS are taken.
        """
        taken = {host.address for host in self.hosts.values()}
        for last in range(FIRST_ADDRESS, FIRST_ADDRESS + MAX_HOSTS):
            address = f"10.77.{self.index}.{last}"
            if address not in taken:
                return address
        raise LabError(
            f"the lab {self.name} is full ({MAX_HOSTS} hosts); end some: python3 -m lab down --lab {self.name} HOST"
        )

    def strays(self) -> list[Host]:
        """Host directories of this lab that its record doesn't name: a crash left them."""
        found = (path.name for path in (self.dir / "hosts").glob("*"))
        return [Host(name, self.name, "nspawn", "", "", "") for name in found if name not in self.hosts]

    def save(self) -> None:
        self.dir.mkdir(parents=True, exist_ok=True)
        write_atomic(self.dir / "state.json", json.dumps(asdict(self), indent=1) + "\n")

    def forget(self) -> None:
        """Remove all that is kept of this lab."""
        shutil.rmtree(self.dir, ignore_errors=True)


def bridge_name(index: int) -> str:
    return "br-nox" if index == 0 else f"br-nox{index}"


def load_lab(name: str) -> Lab | None:
    """Read a lab's record; None when there is none.

    Raises LabError when the record is unreadable.
    """
    path = STATE / name / "state.json"
    try:
        raw = json.loads(path.read_text())
        hosts = {key: Host(**value) for key, value in raw.pop("hosts").items()}
        return Lab(hosts=hosts, **raw)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise LabError(f"{path} is not a lab's record ({exc}); end that lab: python3 -m lab down --lab {name}") from exc


def lab_names() -> list[str]:
    """Every lab with a record, or with a directory that a crash left behind."""
    if not STATE.is_dir():
        return []
    return sorted(path.name for path in STATE.iterdir() if path.is_dir() and valid_name(path.name))


def free_index(lab: str, taken: set[int]) -> int:
    """The /24 for a new lab: the lab ``lab`` gets 0 if it is free, others the lowest from 1 on.

    Raises LabError when 10.77.0.0/16 is used up.
    """
    for index in range(0 if lab == "lab" else 1, 255):
        if index not in taken:
            return index
    raise LabError("no 10.77.K.0/24 is free; end a lab: python3 -m lab status")


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock of this name. The kernel drops it with the process: a crash leaves none behind.

    Locks of a lab have its name, others start with a hyphen, as no lab does.
    """
    locks = STATE / ".locks"  # not in a lab's directory: a lock must outlive what it guards
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / name).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"lab: waiting for another lab command ({name})", file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def write_atomic(path: Path, text: str) -> None:
    """Replace a file so that a reader sees the old or the new text, never a part of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine's boot; None when it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces and parentheses
    return None if fields[0] in "ZX" else int(fields[19])


def read_pid(path: Path) -> int | None:
    """The live process that a file ("PID STARTTIME") names.

    None when it ended, also if its number now belongs to another: that one is not ours to signal.
    """
    try:
        pid, started = (int(word) for word in path.read_text().split())
    except (FileNotFoundError, ValueError):
        return None
    return pid if start_time(pid) == started else None
