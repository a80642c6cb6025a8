"""The zygote: one thread that forks a sandbox each time it is asked, and does nothing else.

Started by pool.py with the host's python3 and a socket to the runner. It lives in a mount
namespace of its own that holds what every run may see; each sandbox inherits that, and adds what
is private to it.

Three processes: the one that pool.py started sees that they end together; the first one of a pid
namespace, an init, has all in it end with itself, at once; the zygote is the second, and the
runner's child, as its sandboxes will be.
"""

from __future__ import annotations

import _socket
import array
import errno
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
from typing import Any

from nox_runner.zygote import child, kernel

READY = b"R"
"""Told once, with JSON: which modules were skipped, the version of Landlock in use, and the numbers
of the init and the zygote.

After it, each byte that comes asks for a sandbox, several for several."""
REHEARSED, PLAIN = b"1", b"0"
"""Those bytes: whether the sandbox goes the way of a job once before it is ready."""
CHILD = b"C"
"""The answer; with it come the job socket, and pidfds of the init and the program's process."""
FAILED = b"E"
"""Begins an answer that says why there is none."""

_BASE = "/tmp"
_OLD = "/old"
_NEW = "/new"


def main(control: socket.socket, hooks: kernel.ForkHooks) -> int:
    """Serve until the runner closes `control`. `hooks` was made before what registers them."""
    config = json.loads(control.recv(1 << 16))
    filters = {}
    for name, descriptor in config["filters"].items():
        with open(descriptor, "rb") as file:
            filters[name] = file.read()
    config["seal"] = kernel.Seal(filters["run"], filters.get("telling_run", b""))
    config["init_seal"] = kernel.Seal(filters["init"])
    # The kernel buries the inits, and whom a program leaves to one: nobody asks how they ended.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        skipped = _import(config["preimport"])
        for name in config["absent"]:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]
        hooks.close()
        config["handlers"] = _take_handlers()
        _build(config)
        config["fork"] = kernel.Fork(hooks)
        config["loopback"] = kernel.Loopback()
    except OSError as error:
        control.send(FAILED + str(error).encode())
        return 1
    sys.dont_write_bytecode = False
    sys.path[:] = [path for path in sys.path if path != config["library"]]
    for name in [name for name in sys.modules if name.partition(".")[0] == "nox_runner"]:
        del sys.modules[name]
    config["landlock"] = child.landlock(config["sandbox"])
    child.prepare(config)
    for which, value in config["inherited_limits"]:
        resource.prlimit(0, which, (value, value))
    landlock = kernel.landlock_version() if config["landlock"] else 0
    try:
        _refuse_shared_memory()
        processes = _settle(config)
        config["idle"] = kernel.Idle()
        kernel.Filter(filters["zygote"])()
    except OSError as error:
        control.send(FAILED + str(error).encode())
        return 1
    ready = {"skipped": skipped, "landlock": landlock, "processes": processes}
    control.send(READY + json.dumps(ready).encode())
    while asked := control.recv(256):
        for kind in asked:
            _hatch(config, control, rehearse=kind == REHEARSED[0])
    return 0


def _settle(config: dict[str, Any]) -> list[int]:
    """Go on as the second process of a pid namespace that ends with this one.

    Gives the numbers outside of that namespace's init and of this process.
    """
    told, tell = os.pipe()
    kernel.unshare_pids()
    init = os.fork()
    if init == 0:
        try:
            # It has nothing to lose, so it has nothing: it holds one pipe, until it says so.
            kernel.prctl(kernel.PR_SET_PDEATHSIG, kernel.SIGKILL)
            kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
            child.close_all_but(tell)
            config["init_seal"]()
            os.write(tell, READY)
            os.close(tell)
            while True:
                signal.pause()
        finally:
            os._exit(1)
    os.close(tell)
    if os.read(told, 1) != READY:
        raise OSError("the init of the zygote's processes did not start")
    os.close(told)
    pid, zygote = config["fork"](0)
    if pid:
        child.close_all_but(zygote)
        poll = select.poll()
        poll.register(zygote, select.POLLIN)
        poll.poll()
        os._exit(0)
    config["own_pids"] = os.open("/proc/self/ns/pid", os.O_RDONLY)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    # Now, to be told here if it is refused.
    kernel.return_pids(config["own_pids"])
    # This /proc is the one outside.
    return [init, int(os.readlink("/proc/self"))]


def _import(names: list[str]) -> dict[str, str]:
    """Import ahead what many programs want; by name, why one was skipped. OSError on threads."""
    skipped = {}
    # Libraries that start a thread per core at import cannot be forked.
    single = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    os.environ.update(single)
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            skipped[name] = f"{type(error).__name__}: {error}"
        if len(os.listdir("/proc/self/task")) > 1:
            raise OSError(f"NOX_PREIMPORT: {name} starts threads, so it cannot be shared")
    for name in single:
        del os.environ[name]
    return skipped


def _take_handlers() -> list[tuple[int, Any]]:
    """Take away this process's signal handlers, which the programs get: a sandbox's init has them,
    too, and must have none (kernel.Idle). OSError if there is one that Python doesn't know.
    """
    all_of_them = ((int(number), signal.getsignal(number)) for number in signal.valid_signals())
    found = [(number, handler) for number, handler in all_of_them if callable(handler)]
    for number, _ in found:
        signal.signal(number, signal.SIG_DFL)
    with open("/proc/self/status") as file:
        caught = next(line for line in file if line.startswith("SigCgt:")).split()[1]
    if int(caught, 16):
        raise OSError(f"NOX_PREIMPORT: a module handles signals by itself: {caught}")
    return found


def _refuse_shared_memory() -> None:
    """OSError if this process has memory that those it forks could write to, for all to see."""
    with open("/proc/self/maps") as file:
        for line in file:
            mode = line.split()[1]
            if "w" in mode and "s" in mode:
                raise OSError(f"memory that all runs would share: {line.strip()}")


def _build(config: dict[str, Any]) -> None:
    """Move to a root that holds what a run may see, and nothing else."""
    kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS | kernel.CLONE_NEWUTS)
    kernel.map_ids(config["uid"], config["gid"])
    socket.sethostname("nox")
    kernel.mount("", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    flags = kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("tmpfs", _BASE, "tmpfs", flags, "mode=0755,size=1m")
    os.mkdir(_BASE + _OLD)
    os.mkdir(_BASE + _NEW)
    kernel.pivot(_BASE, _BASE + _OLD)
    os.chdir("/")
    kernel.mount("tmpfs", _NEW, "tmpfs", flags, "mode=0755,size=1m")
    os.umask(0)
    _system(config)
    _devices()
    _directory(config["sandbox"])
    kernel.bind(_OLD + config["sandbox"], _NEW + config["sandbox"])
    kernel.restrict(
        _NEW + config["sandbox"], kernel.ATTR_NOSUID | kernel.ATTR_NODEV, recursive=True
    )
    for path in (_NEW, _NEW + "/dev"):
        kernel.restrict(path, kernel.ATTR_RDONLY, recursive=False)
    os.chdir(_NEW)
    kernel.pivot(".", ".")
    kernel.detach(".")
    os.chdir(config["sandbox"])


def _system(config: dict[str, Any]) -> None:
    for path in config["roots"]:
        if os.path.islink(_OLD + path):
            os.symlink(os.readlink(_OLD + path), _NEW + path)
        else:
            _read_only(path)
    for path in ("/proc", "/run", "/tmp", "/var"):
        _directory(path)
    _directory("/etc")
    for path in config["etc_from_host"]:
        if os.path.isdir(_OLD + path):
            _directory(path)
            _read_only(path)
        elif os.path.exists(_OLD + path):
            _file(path, b"")
            _read_only(path)
    for path, target in config["links"].items():
        os.symlink(target, _NEW + path)
    for path, text in config["files"].items():
        _file(path, text.encode())
    # Each sandbox covers this with its own; the kernel wants to see that one was allowed before.
    kernel.bind(_OLD + "/proc", _NEW + "/proc")


def _devices() -> None:
    _directory("/dev")
    flags = kernel.MS_NOSUID | kernel.MS_NOEXEC
    kernel.mount("tmpfs", _NEW + "/dev", "tmpfs", flags, "mode=0755,size=64k")
    for name in ("null", "zero", "full", "random", "urandom", "tty"):
        if os.path.exists(f"{_OLD}/dev/{name}"):
            _file(f"/dev/{name}", b"")
            kernel.bind(f"{_OLD}/dev/{name}", f"{_NEW}/dev/{name}")
    for path in ("/dev/shm", "/dev/pts"):
        _directory(path)
    for name, target in (
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("ptmx", "pts/ptmx"),
    ):
        os.symlink(target, f"{_NEW}/dev/{name}")


def _directory(path: str) -> None:
    here = _NEW
    for part in path.strip("/").split("/"):
        here += "/" + part
        try:
            os.mkdir(here, 0o755)
        except FileExistsError:
            continue


def _file(path: str, text: bytes) -> None:
    descriptor = os.open(_NEW + path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
    os.write(descriptor, text)
    os.close(descriptor)


def _read_only(path: str) -> None:
    if not os.path.lexists(_NEW + path):
        _directory(path)
    kernel.bind(_OLD + path, _NEW + path)
    attributes = kernel.ATTR_RDONLY | kernel.ATTR_NOSUID | kernel.ATTR_NODEV
    kernel.restrict(_NEW + path, attributes, recursive=True)


def _hatch(config: dict[str, Any], control: socket.socket, *, rehearse: bool) -> None:
    # Without socket.socket around it, whose making is longer than the call.
    runner_side, job = _socket.socketpair()
    # With what the program's process says come its pid and user, told by the kernel.
    runner_side.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    handles = []
    try:
        kernel.unshare_pids()
        handles.append(config["idle"]())
        namespaces = child.NAMESPACES
        if config["network"]:
            namespaces &= ~kernel.CLONE_NEWNET
        pid, handle = config["fork"](namespaces)
        if pid == 0:
            child.live(config, job, rehearse)
        handles.append(handle)
        sent = array.array("i", [runner_side.fileno(), *handles])
        control.sendmsg([CHILD], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, sent)])
    except OSError as error:
        if handles:
            signal.pidfd_send_signal(handles[0], signal.SIGKILL)
        if error.errno == errno.EPIPE:
            raise
        control.send(FAILED + str(error).encode())
    finally:
        kernel.return_pids(config["own_pids"])
        runner_side.close()
        job.close()
        for handle in handles:
            os.close(handle)
