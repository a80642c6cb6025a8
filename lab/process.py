"""A host's processes: apart from the command that starts them, in a control group of their own.

nspawn hands a host the group it was started in. Were that the machine's root group for all, each
host would see, and by ``cgroup.kill`` or a unit's stop also end, the processes of the units of the
same name on all the others. A group of its own is also the one sure way to find and end what
belongs to a host, and nothing else.
"""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from lab.machine import has_systemd, mounted, run
from lab.state import STATE, Host, LabError, read_pid, start_time

RESTART = 133  # the exit code by which a rebooting host asks for a new start; systemd-nspawn's own
POWEROFF_BOUND = 8  # seconds a host gets to shut down by itself
_PARENT = "nox-lab"
_PRIVATE = STATE / ".cgroup2"


# --- control groups ---


def _mounts(kind: str) -> list[tuple[Path, list[str]]]:
    """(mount point, options) of every mounted file system of a kind."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, filesystem = line.partition(" - ")
        if filesystem.split()[0] == kind:
            found.append((Path(mount.split()[4]), filesystem.split()[2].split(",")))
    return found


def _hierarchy() -> Path:
    """Where the machine's cgroup v2 hierarchy is mounted; where it isn't, mount it for us alone."""
    mounts = _mounts("cgroup2")
    if mounts:
        return mounts[0][0]
    _PRIVATE.mkdir(parents=True, exist_ok=True)
    run("mount", "-t", "cgroup2", "nox-lab", _PRIVATE)
    return _PRIVATE


def _unit(host: Host) -> str:
    """The unit a host runs in where systemd is the machine's PID 1."""
    return f"nox-lab-{host.machine}.service"


def group_of(host: Host) -> Path:
    """The control group of a host; it need not exist."""
    if has_systemd():  # which wants to be the only one to create groups
        return _hierarchy() / "system.slice" / _unit(host)
    return _hierarchy() / _PARENT / host.machine


def _mirrors(group: Path) -> list[Path]:
    """The same group in systemd's own v1 hierarchy, where the machine has it: nspawn looks there
    first for where it is, and mirrors its groups there."""
    mounts = _mounts("cgroup")
    return [mount / _PARENT / group.name for mount, options in mounts if "name=systemd" in options]


def orphan_groups(machines: set[str]) -> list[Path]:
    """The groups of lab hosts that aren't among these machine names."""
    if has_systemd():
        known = {f"nox-lab-{name}.service" for name in machines}
        groups = _hierarchy().glob("system.slice/nox-lab-*.service")
    else:
        known = machines
        groups = (path for path in (_hierarchy() / _PARENT).glob("*") if path.is_dir())
    return sorted(path for path in groups if path.name not in known)


def _pids(group: Path) -> set[int]:
    """Every process in a group and below; empty when there is no such group."""
    found: set[int] = set()
    for listing in group.glob("**/cgroup.procs"):
        with suppress(OSError):
            found.update(int(line) for line in listing.read_text().split())
    return found


def populated(group: Path) -> bool:
    """Whether a live process is in a group or below."""
    try:
        return "populated 1" in (group / "cgroup.events").read_text()
    except OSError:
        return False


def kill_group(group: Path) -> None:
    """End every process in a group and below, at once."""
    try:
        (group / "cgroup.kill").write_text("1")
    except FileNotFoundError:  # there is no such group, or Linux is older than 5.14
        for pid in _pids(group):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def leave_hierarchy() -> None:
    """Unmount the hierarchy, if it was mounted for us alone."""
    if mounted(_PRIVATE):
        run("umount", "--lazy", _PRIVATE)


def remove_group(group: Path) -> None:
    """Remove an empty group with what is below it, and its mirror."""
    if has_systemd():
        return
    for top in [group, *_mirrors(group)]:
        for directory, _, _ in os.walk(top, topdown=False):
            with suppress(OSError):
                Path(directory).rmdir()
        with suppress(OSError):  # works with the last host
            top.parent.rmdir()


# --- a host's main process ---


def launch(host: Host, command: str) -> None:
    """Run a host's shell command in its own group, session and log file, apart from this process.

    It is run again for as long as it ends with RESTART. The file ``pid`` in the host's directory
    then names its main process (see read_pid).
    """
    script = host.dir / "start"
    script.write_text(
        "#!/bin/sh\n"
        "# Written by `python3 -m lab`: starts this host. Arguments: the control groups to enter.\n"
        'for group; do echo 0 >"$group/cgroup.procs"; done\n'
        'echo "$$ $(cut -d" " -f22 /proc/$$/stat)" >pid\n'
        f"{command}\n"
    )
    if has_systemd():
        properties = {
            "Delegate": "yes",
            "KillMode": "mixed",
            "RestartForceExitStatus": str(RESTART),
            "RestartSec": "0",
            "SuccessExitStatus": str(RESTART),
            "StandardError": f"append:{host.console}",
            "StandardOutput": f"append:{host.console}",
            "TasksMax": "infinity",
            "TimeoutStopSec": str(POWEROFF_BOUND),
            "WorkingDirectory": str(host.dir),
        }
        options = [f"--property={name}={value}" for name, value in properties.items()]
        unit = f"--unit={_unit(host)}"
        run("systemd-run", "--quiet", "--collect", unit, *options, "/bin/sh", script)
        return
    group = group_of(host)
    groups = [str(group), *map(str, _mirrors(group))]
    try:
        for path in groups:
            Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise LabError(f"can't create {exc.filename}: {exc.strerror} (a read-only /sys/fs/cgroup?)") from exc
    with host.console.open("a") as log:
        # This loop itself stays outside of the groups: a new start wants them empty.
        supervisor = subprocess.Popen(
            ["sh", "-c", f'while sh start "$@"; [ $? -eq {RESTART} ]; do :; done', "sh", *groups],
            cwd=host.dir,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    (host.dir / "supervisor").write_text(f"{supervisor.pid} {start_time(supervisor.pid)}\n")


def main_pid(host: Host) -> int | None:
    """The host's main process (systemd-nspawn, or the User-mode Linux kernel); None without one."""
    return read_pid(host.dir / "pid")


def alive(host: Host) -> bool:
    """Whether the host runs, or is between the two halves of a reboot."""
    if has_systemd():
        return populated(group_of(host))
    return main_pid(host) is not None or read_pid(host.dir / "supervisor") is not None


def running(host: Host) -> bool:
    """Whether anything of the host still runs, with or without its main process."""
    return alive(host) or populated(group_of(host))


def ask_to_stop(host: Host) -> None:
    """Ask the host's main process to end, and see to it that nobody starts it again."""
    supervisor = read_pid(host.dir / "supervisor")
    if supervisor:
        with suppress(ProcessLookupError):
            os.kill(supervisor, signal.SIGKILL)
    pid = main_pid(host)
    if has_systemd():
        run("systemctl", "stop", "--no-block", _unit(host), check=False)
    elif pid:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def memory(host: Host) -> int:
    """Bytes of memory that the host alone uses.

    The account of its group where there is one; else what its processes hold that is no file's.
    """
    group = group_of(host)
    with suppress(OSError):
        return int((group / "memory.current").read_text())
    total = 0
    for pid in _pids(group):
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    total += int(line.split()[1]) * 1024
    return total
