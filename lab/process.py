"""A host's processes: started apart from the command, each host in a control group of its own, ended by that group.

nspawn hands a host the group it was started in. Were that the machine's root group for all, every host would see, and
with ``cgroup.kill`` or a unit's stop also end, the processes of the units of the same name on all other hosts. A group
of its own is also the one sure way to find and end what belongs to a host, and nothing else.
"""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from lab.machine import has_systemd, run
from lab.state import STATE, Host, LabError, read_pid, start_time

_PARENT = "nox-lab"
RESTART = 133  # the exit code by which a rebooting host asks for a new start; systemd-nspawn's own
POWEROFF_BOUND = 8  # seconds a host gets to shut down by itself


# --- control groups ----------------------------------------------------------------------------------------------


def _mounts(kind: str) -> list[tuple[Path, str]]:
    """(mount point, super options) of every mounted file system of a kind."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split()[0] == kind:
            found.append((Path(before.split()[4]), after.split()[2]))
    return found


def _hierarchy() -> Path:
    """Where the machine's cgroup v2 hierarchy is mounted; a private mount where it has none."""
    mounts = _mounts("cgroup2")
    if mounts:
        return mounts[0][0]
    private = STATE / ".cgroup2"
    private.mkdir(parents=True, exist_ok=True)
    run("mount", "-t", "cgroup2", "none", private)
    return private


def _unit(host: Host) -> str:
    """The unit a host runs in where systemd is the machine's PID 1."""
    return f"nox-lab-{host.machine}.service"


def group_of(host: Host) -> Path:
    """The control group of a host; it need not exist."""
    if has_systemd():  # which hands out groups itself: nobody else may create any
        return _hierarchy() / "system.slice" / _unit(host)
    return _hierarchy() / _PARENT / host.machine


def orphan_groups(machines: set[str]) -> list[Path]:
    """The groups of hosts that nobody knows any more: not among these machine names."""
    hierarchy = _hierarchy()
    if has_systemd():
        groups = {
            path.name.removeprefix("nox-lab-").removesuffix(".service"): path
            for path in hierarchy.glob("system.slice/nox-lab-*.service")
        }
    else:
        groups = {path.name: path for path in hierarchy.glob(f"{_PARENT}/*") if path.is_dir()}
    return [path for name, path in sorted(groups.items()) if name not in machines]


def _pids(group: Path) -> set[int]:
    """Every process in a group and below; empty when there is no such group."""
    found: set[int] = set()
    for listing in [group / "cgroup.procs", *group.glob("**/cgroup.procs")]:
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
    except FileNotFoundError:  # the group is gone, or Linux is older than 5.14
        for pid in _pids(group):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def remove_group(group: Path) -> None:
    """Remove an empty group, what is below, and nspawn's mirror of it in systemd's v1 hierarchy."""
    if has_systemd():
        return
    mirrors = [
        mount / _PARENT / group.name
        for mount, options in _mounts("cgroup")
        if "name=systemd" in options.split(",")
    ]
    for top in [group, *mirrors]:
        for directory, _, _ in os.walk(top, topdown=False):
            with suppress(OSError):
                Path(directory).rmdir()
        with suppress(OSError):  # goes with the last host
            top.parent.rmdir()


# --- a host's main process ---------------------------------------------------------------------------------------


def launch(host: Host, command: str) -> None:
    """Run a host's shell command in its own control group, session and log file; it outlives this process.

    It is run again for as long as it ends with RESTART. The host's file ``pid`` then holds its main process and that
    one's start time.
    """
    script = host.dir / "start"
    script.write_text(
        "#!/bin/sh\n"
        "# Written by `python3 -m lab`: starts this host. $1: the control group to enter, if any.\n"
        'if [ -n "$1" ]; then echo 0 >"$1/cgroup.procs"; fi\n'
        'echo "$$ $(cut -d" " -f22 /proc/$$/stat)" >pid\n'
        f"{command}\n"
    )
    if has_systemd():
        properties = {
            "Delegate": "yes",
            "KillMode": "mixed",
            "TasksMax": "infinity",
            "TimeoutStopSec": str(POWEROFF_BOUND),
            "WorkingDirectory": str(host.dir),
            "StandardOutput": f"append:{host.console}",
            "StandardError": f"append:{host.console}",
            "RestartForceExitStatus": str(RESTART),
            "SuccessExitStatus": str(RESTART),
        }
        options = [f"--property={name}={value}" for name, value in properties.items()]
        run(
            "systemd-run",
            "--quiet",
            "--collect",
            f"--unit={_unit(host)}",
            *options,
            "/bin/sh",
            script,
        )
        return
    group = group_of(host)
    try:
        group.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise LabError(
            f"can't create the control group {group}: {exc.strerror}; is /sys/fs/cgroup mounted read-only?"
        ) from exc
    with host.console.open("a") as log:
        # The supervisor stays outside of the group, which must be empty for a new start.
        supervisor = subprocess.Popen(
            ["sh", "-c", f'while sh start "$0"; [ $? -eq {RESTART} ]; do :; done', str(group)],
            cwd=host.dir,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    (host.dir / "supervisor").write_text(f"{supervisor.pid} {start_time(supervisor.pid)}\n")


def main_pid(host: Host) -> int | None:
    """The host's main process (systemd-nspawn, or the User-mode Linux kernel); None when it ended."""
    return read_pid(host.dir / "pid")


def alive(host: Host) -> bool:
    """Whether the host runs, or is between the two halves of a reboot."""
    return main_pid(host) is not None or read_pid(host.dir / "supervisor") is not None


def ask_to_stop(host: Host) -> None:
    """Ask the host's main process to end, and make sure that nobody starts it again."""
    supervisor = read_pid(host.dir / "supervisor")
    if supervisor:
        with suppress(ProcessLookupError):
            os.kill(supervisor, signal.SIGKILL)
    if has_systemd():
        run("systemctl", "stop", "--no-block", _unit(host), check=False)
        return
    pid = main_pid(host)
    if pid:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def running(host: Host) -> bool:
    """Whether anything at all of the host still runs, with or without its main process."""
    return alive(host) or populated(group_of(host))


def memory(host: Host) -> int:
    """Bytes of memory that only this host uses: its group's account where there is one, else what its processes
    hold that is no file's, pages they share counted once."""
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
