"""The command line that seals a program in fresh namespaces with bubblewrap.

Only options of bubblewrap 0.6.1 (Ubuntu 22.04) are used unconditionally.
"""

from __future__ import annotations

import functools
import inspect
import os
import pwd
import re
import subprocess
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import PurePosixPath

from nox_runner import bootstrap, tmpfs
from nox_runner.absent import absent
from nox_runner.backend import Program
from nox_runner.limits import Limits

SOURCES = {"python": "/run/nox/main.py", "sh": "/run/nox/main.sh"}
"""Where the program's text is seen from inside."""

ROOTS = ("bin", "lib", "lib32", "lib64", "libx32", "sbin")
ETC_FROM_HOST = ("/etc/alternatives", "/etc/ld.so.cache")
ETC_WITH_NETWORK = ("/etc/ssl/certs", "/etc/ssl/openssl.cnf", "/etc/services")
"""Beside those, where runs may use the network."""
RUN_SIZE = 1 << 20
# systemd-resolved's list of real servers: its own address is the host's loopback, which stays shut.
_RESOLVERS = ("/run/systemd/resolve/resolv.conf", "/etc/resolv.conf")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ABSENT = tuple(absent())
# `if __name__ == "__main__"` holds under -c too; the docstring is for readers of the module.
_BOOTSTRAP = (
    inspect.getsource(bootstrap)
    .replace(bootstrap.__doc__ or "", "", 1)
    .replace("_ABSENT = ()", f"_ABSENT = {ABSENT}", 1)
)


@dataclass(frozen=True)
class Command:
    """An installed bubblewrap; OSError from `version` when `path` is not one."""

    path: str = "/usr/bin/bwrap"

    @functools.cached_property
    def version(self) -> tuple[int, ...]:
        """Such as (0, 6, 1)."""
        try:
            told = subprocess.run(
                [self.path, "--version"], capture_output=True, env={}, timeout=10, text=True
            ).stdout
        except subprocess.SubprocessError as error:
            raise OSError(f"{self.path} --version does not answer") from error
        match = re.search(r"(\d+)\.(\d+)\.(\d+)", told)
        if not match:
            raise OSError(f"{self.path} --version says {told!r}")
        return tuple(int(number) for number in match.groups())

    @property
    def sizes_tmpfs(self) -> bool:
        """Whether there is --size; without it a tmpfs by itself holds up to half of the memory."""
        return self.version >= (0, 7, 0)

    def argv(self, arguments: int, program: Program) -> list[str]:
        """The argv. It holds no code and no environment: any local user may read it.

        `arguments` is a descriptor of what `options` gives.
        """
        if program.language == "python":
            inner = ["/usr/bin/python3", "-I", "-c", _BOOTSTRAP, SOURCES["python"]]
        else:
            inner = ["/bin/sh", SOURCES["sh"]]
        return [self.path, "--args", str(arguments), "--", *inner, *program.args]

    def options(
        self,
        program: Program,
        limits: Limits,
        sandbox: str,
        gate: int,
        status: int,
        open_fds: ExitStack,
        call_filter: bytes,
    ) -> tuple[bytes, list[int]]:
        """What goes through --args, NUL-separated, and the descriptors it refers to.

        bubblewrap waits at `gate` before the program starts, and reports to `status`.
        New descriptors are closed by `open_fds`.
        """
        descriptors = [gate, status, program.source]
        options = [
            *("--unshare-user", "--unshare-pid", "--unshare-ipc"),
            *(() if limits.network else ("--unshare-net",)),
            *("--unshare-uts", "--unshare-cgroup-try", "--hostname", "nox"),
            *("--die-with-parent", "--new-session", "--cap-drop", "ALL"),
            *("--block-fd", str(gate), "--json-status-fd", str(status)),
            *("--ro-bind", "/usr", "/usr"),
        ]
        if call_filter:
            descriptor = memory_file("seccomp", call_filter)
            open_fds.callback(os.close, descriptor)
            descriptors.append(descriptor)
            options += ["--seccomp", str(descriptor)]
        for name in ROOTS:
            options += _root(name)
        options += ["--proc", "/proc", "--dev", "/dev"]
        # bubblewrap's own init can be written to through its memory's file: so that is covered.
        options += ["--tmpfs", "/proc/1", "--remount-ro", "/proc/1"]
        for path in ("/etc", "/run", "/var"):
            options += _directory(path)
        for path in tmpfs.PATHS:
            options += self._tmpfs(path, limits.tmp_size)
        if not sandbox.startswith("/var/tmp/"):
            # Bounded together with /tmp.
            options += ["--symlink", "/tmp", "/var/tmp"]
        if self.sizes_tmpfs:
            options += self._tmpfs("/run", RUN_SIZE)  # otherwise it is part of /, read-only
        # Without --perms the file would be the owner's only; a umask may forbid even that.
        options += ["--perms", "0444", "--ro-bind-data"]
        options += [str(program.source), SOURCES[program.language]]
        for path in (*ETC_FROM_HOST, *(ETC_WITH_NETWORK if limits.network else ())):
            options += ["--ro-bind-try", path, path]
        if os.path.islink("/etc/localtime"):
            options += ["--symlink", os.readlink("/etc/localtime"), "/etc/localtime"]
        for path, text in etc(sandbox, limits.network).items():
            descriptor = memory_file(path, text.encode())
            open_fds.callback(os.close, descriptor)
            descriptors.append(descriptor)
            options += ["--perms", "0444", "--file", str(descriptor), path]
        for parent in reversed(PurePosixPath(sandbox).parents[:-1]):
            options += _directory(str(parent))
        options += ["--bind", sandbox, sandbox, "--chdir", sandbox]
        # bubblewrap builds / and /dev on tmpfs, writable and unbounded.
        options += ["--remount-ro", "/dev", "--remount-ro", "/"]
        for name, value in {**environment(sandbox), **own_environment(program)}.items():
            options += ["--setenv", name, value]
        return b"".join(option.encode() + b"\0" for option in options), descriptors

    def _tmpfs(self, path: str, size: int) -> list[str]:
        return [*(("--size", str(size)) if self.sizes_tmpfs else ()), "--tmpfs", path]


def memory_file(name: str, content: bytes = b"") -> int:
    """A memfd that holds `content`, at its start."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def environment(sandbox: str) -> dict[str, str]:
    """What every run's environment begins with."""
    return {
        "HOME": sandbox,
        "LANG": "C.UTF-8",
        "PATH": _PATH,
        # HOME is shared: what one run leaves there must not begin every later interpreter.
        "PYTHONNOUSERSITE": "1",
        "TMPDIR": "/tmp",
        "USER": _user(),
    }


def own_environment(program: Program) -> dict[str, str]:
    """What a run adds to it."""
    return {**program.env, "NOX_RUN_ID": program.run_id}


def _root(name: str) -> list[str]:
    """/bin and its like as the host has them: links into /usr, or directories of their own."""
    path = f"/{name}"
    if os.path.islink(path):
        return ["--symlink", os.readlink(path), path]
    if os.path.isdir(path):
        return ["--ro-bind", path, path]
    return []


def _directory(path: str) -> list[str]:
    """An empty directory, unless there is one. bubblewrap by itself would make it 0700."""
    return ["--perms", "0755", "--dir", path]


@functools.cache
def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return "nox"


def etc(sandbox: str, network: bool) -> dict[str, str]:
    """The few files of /etc that ordinary programs look for. The host's /etc stays outside."""
    found = {}
    if network:
        for path in _RESOLVERS:
            with suppress(OSError), open(path) as file:
                found["/etc/resolv.conf"] = file.read()
                break
    user, uid, gid = _user(), os.getuid(), os.getgid()
    return {
        **found,
        "/etc/passwd": f"{user}:x:{uid}:{gid}::{sandbox}:/bin/sh\n",
        "/etc/group": f"{user}:x:{gid}:\n",
        "/etc/hostname": "nox\n",
        "/etc/hosts": "127.0.0.1 localhost nox\n::1 localhost nox\n",
        "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files"
        + (" dns\n" if network else "\n"),
    }
