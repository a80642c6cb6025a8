"""What the lab remembers between commands: labs, their hosts, and which process belongs to which host."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

STATE = Path("/var/lib/nox-lab")
CACHE = Path("/var/cache/nox-lab")

KINDS = ("nspawn", "uml")
MAX_HOSTS = 100
FIRST_ADDRESS = 11  # the last octet of a lab's first host; .1 is the gateway
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")


class LabError(Exception):
    """Something failed; the message names the thing, the cause and the command that helps. Exit code 1."""


class CannotHost(LabError):
    """This machine can't run lab hosts at all. Exit code 4."""


def valid_name(name: str) -> bool:
    """Whether a lab or host may be called this: a DNS label in lower case, at most 32 characters."""
    return _NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class Host:
    """One host of a lab. ``address`` is IPv4 without a prefix length, ``base`` the root (or image) it was made from."""

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
    """A named set of hosts with a bridge and a /24 of its own: ``10.77.<index>.0/24``."""

    name: str
    index: int
    hosts: dict[str, Host] = field(default_factory=dict)
    inventory: str | None = (
        None  # an inventory directory outside the state directory that is kept in step
    )

    @property
    def dir(self) -> Path:
        return STATE / self.name

    @property
    def key(self) -> Path:
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
            f"lab {self.name} is full ({MAX_HOSTS} hosts); end some: python3 -m lab down --lab {self.name} HOST"
        )

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
        raise LabError(
            f"{path} is not a lab record ({exc}); remove the lab: python3 -m lab down --all --lab {name}"
        ) from exc


def lab_names() -> list[str]:
    """Every lab with a record, or with a directory that a crash left behind."""
    if not STATE.is_dir():
        return []
    return sorted(
        entry.name for entry in STATE.iterdir() if entry.is_dir() and valid_name(entry.name)
    )


def free_index(lab: str, taken: set[int]) -> int:
    """The /24 for a new lab: 0 belongs to the lab called ``lab``, the others get the lowest free number.

    Raises LabError when 10.77.0.0/16 is used up.
    """
    for index in range(0 if lab == "lab" else 1, 255):
        if index not in taken:
            return index
    raise LabError("no free 10.77.K.0/24 is left; see: python3 -m lab status")


@contextmanager
def locked(name: str, wait: bool = True) -> Iterator[None]:
    """Hold the lock of this name. The kernel drops it with the process, so a crash leaves none behind.

    Raises LabError when ``wait`` is false and someone else holds it.
    """
    locks = (
        STATE / ".locks"
    )  # outside the labs' directories: a lock file must outlive what it guards
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / name).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise LabError(
                f"another lab command is at work on {name}; wait for it and try again"
            ) from None
        yield


def write_atomic(path: Path, text: str, mode: int = 0o644) -> None:
    """Replace a file so that a reader sees the old or the new text, never a part of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "w") as handle:
        handle.write(text)
    temporary.chmod(mode)  # past the umask
    temporary.replace(path)


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine booted; None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces and parentheses
    return None if fields[0] in "ZX" else int(fields[19])


def read_pid(path: Path) -> int | None:
    """The live process a pid file ("PID STARTTIME") names; None when it ended, even if its number was given to another."""
    try:
        pid, started = (int(word) for word in path.read_text().split())
    except (FileNotFoundError, ValueError):
        return None
    return pid if start_time(pid) == started else None
