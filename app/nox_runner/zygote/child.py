"""One sandbox from the inside: an init that reports, and the process that becomes the program.

The init is process 1 of its namespaces. It alone holds the pipe to the runner, and tells there how
the program really ended. The program cannot reach it: it is not dumpable (so /proc/1 and ptrace
are closed), and a namespace's init gets no signal from inside that it has no handler for.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import atexit
import builtins
import gc
import json
import os
import resource
import signal
import socket
import struct
import sys
import threading
import types
from collections.abc import Callable
from itertools import islice
from typing import Any, NoReturn

from nox_runner.zygote import kernel

REPORT = struct.Struct("=i?qq")
"""Wait status; whether no other process was left; CPU time in µs and largest RSS in KiB."""
READY = struct.Struct("=q")
"""CPU time in µs that was spent before the job. With it come the descriptors of its exit's notice,
if there is one: the listener, and what NOTICE_FILES names."""
JOB = struct.Struct("=I")
"""Length of the JSON text of a job; with it come the descriptors."""
NOTICE_FILES = ("self/status", "thread-self/children", "1/task/1/children", "self/stat")
"""Below /proc: what tells, at its exit, whether the program is alone, and what it has used."""
SEALED = b"S"
"""Comes through the report's pipe when the init has given up its privileges."""
FAILED = b"E"
"""Begins what is told in place of READY when a sandbox cannot be made."""

NAMESPACES = (
    kernel.CLONE_NEWUSER
    | kernel.CLONE_NEWPID
    | kernel.CLONE_NEWNS
    | kernel.CLONE_NEWNET
    | kernel.CLONE_NEWIPC
    | kernel.CLONE_NEWUTS
    | kernel.CLONE_NEWCGROUP
)
_PLACE = "/run/nox"
# The filter forbids namespaces too; a second wall costs nothing.
_USER_LIMITS = {
    "user_namespaces": 0,
    "inotify_instances": 16,
    "inotify_watches": 4096,
}
_SIGNALS = _signal.valid_signals()
_known = _null = _most = 0
_REHEARSAL = json.dumps({"env": {"NOX_RUN_ID": "0" * 32}, "args": []}).encode()
_WALL = 0x40000000  # also children that were cloned without a signal
# RTM_NEWLINK (request, acknowledge) of interface 1, the loopback: up.
_LOOPBACK_UP = struct.pack("=IHHII", 32, 16, 5, 1, 0) + struct.pack("=BxHiII", 0, 0, 1, 1, 1)


def landlock(sandbox: str) -> tuple[dict[str, int], int] | None:
    """The rights to files that a run has, by path, and all that Landlock is to look after.

    None where it cannot be used: before version 2 (Linux 5.19) it forbids every renaming from one
    directory to another, which honest programs do.
    """
    version = kernel.landlock_version()
    if version < 2:
        return None
    handled = kernel.LANDLOCK_ALL
    write = kernel.LANDLOCK_WRITE
    if version >= 3:
        handled |= kernel.LANDLOCK_TRUNCATE
        write |= kernel.LANDLOCK_TRUNCATE
    own = handled & ~kernel.LANDLOCK_DEVICES
    some = kernel.LANDLOCK_READ | write
    rights = {"/": kernel.LANDLOCK_READ, "/dev": some, "/proc": some}
    return {**rights, **dict.fromkeys(("/tmp", "/dev/shm", "/run", sandbox), own)}, handled


def prepare(config: dict[str, Any]) -> None:
    """Before any fork: what can be settled once for all sandboxes."""
    global _known, _null, _most
    _null = os.open("/dev/null", os.O_RDWR)
    _most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    os.environ.clear()
    os.environ.update(config["environment"])
    _known = len(sys.modules)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.collect()
    # What is there now is not looked at again by any collection, so its pages stay shared. And
    # none takes place before a program begins.
    gc.freeze()
    gc.disable()


def init(config: dict[str, Any], job: socket.socket, report: int) -> NoReturn:
    """Be process 1: build the rest of the sandbox, start the program's process, see it end."""
    try:
        kernel.prctl(kernel.PR_SET_PDEATHSIG, kernel.SIGKILL)
        # By the C function: signal.signal() makes enumerations of its arguments, which writes to
        # a hundred pages.
        _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
        os.setsid()
        # All that can be is done in the other process: each page that this one writes to has
        # to be copied, and once more there.
        code = os.fork()
        if code == 0:
            try:
                os.close(report)
                _become_program(config, job, _build(config, job))
            except BaseException as error:
                job.send(FAILED + str(error).encode()[:4000])
            finally:
                os._exit(126)
        _close_all_but(report)
        # No program begins before it is told that this is done.
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
        kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
        config["init_seal"]()
        # A rehearsal, so that the pages it writes to are this process's own by then.
        _report(0, alone=_alone())
        os.write(report, SEALED)
        while True:
            pid, status = os.waitpid(-1, _WALL)
            if pid == code:
                break
        os.write(report, _report(status, alone=_alone()))
    finally:
        # With its init the whole namespace ends.
        os._exit(0)


def _report(status: int, *, alone: bool) -> bytes:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    micros = round((used.ru_utime + used.ru_stime) * 1e6)
    return REPORT.pack(status, alone, micros, used.ru_maxrss)


def _alone() -> bool:
    """Whether no process of the program is left. Each would be, in the end, a child of init."""
    try:
        while True:
            pid, _ = os.waitpid(-1, os.WNOHANG | _WALL)
            if pid == 0:
                return False
    except ChildProcessError:
        return True


def _build(config: dict[str, Any], job: socket.socket) -> list[int]:
    """Make the rest of the sandbox, and give up what that took; the descriptors of its notice."""
    _close_all_but(job.fileno())
    os.setsid()
    kernel.map_ids(config["uid"], config["gid"])
    _mounts(config)
    if not config["network"]:
        _loopback()
    _own_limits()
    notice = _notice(config)
    if config["landlock"]:
        kernel.landlock(*config["landlock"])
    config["seal"]()
    return notice


def _notice(config: dict[str, Any]) -> list[int]:
    listener = config["notice"]() if "notice" in config else -1
    if listener < 0:
        return []
    files = [os.open(f"/proc/{name}", os.O_RDONLY) for name in NOTICE_FILES]
    return [listener, *files]


def _mounts(config: dict[str, Any]) -> None:
    flags = kernel.MS_NOSUID | kernel.MS_NODEV
    kernel.mount("proc", "/proc", "proc", flags | kernel.MS_NOEXEC)
    size, files = config["tmp_size"], config["tmp_files"]
    for path in ("/tmp", "/dev/shm"):
        kernel.mount("tmpfs", path, "tmpfs", flags, f"mode=1777,size={size},nr_inodes={files}")
    # The program's own text is there as well.
    size = config["run_size"]
    kernel.mount("tmpfs", "/run", "tmpfs", flags, f"mode=0755,size={size},nr_inodes=1024")
    os.mkdir(_PLACE, 0o755)
    terminals = kernel.MS_NOSUID | kernel.MS_NOEXEC
    kernel.mount("devpts", "/dev/pts", "devpts", terminals, "newinstance,ptmxmode=0666,mode=620")
    sandbox = config["sandbox"]
    if sandbox.startswith("/tmp/"):
        # Covered now, but for this process, whose working directory it is.
        os.makedirs(sandbox, 0o755)
        kernel.bind(".", sandbox)
    os.chdir(sandbox)


def _loopback() -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as link:
        link.send(_LOOPBACK_UP)
        (error,) = struct.unpack_from("=i", link.recv(4096), 16)
        if error:
            raise OSError(-error, f"the loopback does not come up: {os.strerror(-error)}")


def _own_limits() -> None:
    """Limits that the kernel keeps per user namespace, below the user's own, which all share."""
    for name, value in _USER_LIMITS.items():
        try:
            kernel.write(f"/proc/sys/user/max_{name}", str(value))
        except FileNotFoundError:
            continue


def _close_all_but(*kept: int) -> None:
    """Close all descriptors but `kept`, and the standard ones, which become the null device."""
    for descriptor in range(3):
        os.dup2(_null, descriptor)
    start = 3
    for descriptor in sorted(kept):
        os.closerange(start, descriptor)
        start = descriptor + 1
    os.closerange(start, _most)


def _become_program(config: dict[str, Any], job: socket.socket, notice: list[int]) -> NoReturn:
    os.umask(0o022)
    if "random" in sys.modules:
        sys.modules["random"].seed()
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    sys.path.append(os.getcwd())
    _rehearse()
    used = resource.getrusage(resource.RUSAGE_SELF)
    ready = READY.pack(round((used.ru_utime + used.ru_stime) * 1e6))
    socket.send_fds(job, [ready], notice)
    # The listener above all: a program must not be the one who is told.
    for descriptor in notice:
        os.close(descriptor)
    wanted, descriptors = _receive(job)
    job.close()
    source, *streams = descriptors
    # In front of the first: stdin is the null device already, and may stay that.
    for number, descriptor in enumerate(streams, start=3 - len(streams)):
        os.dup2(descriptor, number)
    text = os.pread(source, os.fstat(source).st_size, 0)
    os.closerange(3, max(descriptors) + 1)
    os.environ.update(wanted["env"])
    path = wanted["path"]
    _write(path, text)
    if wanted["language"] == "sh":
        # As a shell expects them; Python ignores both.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        os.execv("/bin/sh", ["/bin/sh", path, *wanted["args"]])
    sys.argv = [path, *wanted["args"]]
    gc.enable()
    _finish(*_python(text, path))


def _receive(job: socket.socket) -> tuple[dict[str, Any], list[int]]:
    text, descriptors, _, _ = socket.recv_fds(job, 1 << 16, 4)
    if len(text) < JOB.size:
        os._exit(0)  # never needed
    end = JOB.size + JOB.unpack_from(text)[0]
    while len(text) < end:
        piece = job.recv(end - len(text))
        if not piece:
            os._exit(0)
        text += piece
    return json.loads(text[JOB.size :]), descriptors


def _write(path: str, text: bytes) -> None:
    with open(path, "wb", buffering=0) as file:
        view = memoryview(text)
        while view:
            view = view[file.write(view) :]


def _rehearse() -> None:
    """Go the way of a job once, so that the pages it writes to are this process's own by then."""
    path = f"{_PLACE}/main.py"
    text = b"def f(x):\n    return [str(x)]\nprint(f(1))\n"
    near, far = socket.socketpair()
    socket.send_fds(far, [JOB.pack(len(_REHEARSAL)) + _REHEARSAL], [0, 0])
    wanted, (source, other) = _receive(near)
    near.close()
    far.close()
    os.dup2(other, source)
    os.closerange(source, other + 1)
    _write(path, text)
    os.environ.update(wanted["env"])
    sys.argv = [path, *wanted["args"]]
    _python(text, path)
    _settle()
    sys.stdout.flush()
    os.unlink(path)


def _python(text: bytes, path: str) -> tuple[int, int | None]:
    """Run a program's text as `__main__`, as bootstrap.py does; its exit code or deadly signal."""
    for stream in (sys.stdout, sys.stderr):
        # What was printed before a timeout is worth having.
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    main = types.ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __file__=path)
    sys.modules["__main__"] = main
    try:
        code = compile(text, path, "exec", dont_inherit=True)
        exec(code, main.__dict__)
    except SystemExit as error:
        return _exit_code(error), None
    except BaseException as error:
        own_frame = error.__traceback__
        error.__traceback__ = own_frame.tb_next if own_frame else None
        sys.excepthook(type(error), error, error.__traceback__)
        return 1, signal.SIGINT if isinstance(error, KeyboardInterrupt) else None
    return 0, None


def _exit_code(error: SystemExit) -> int:
    code = error.code
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    _quietly(lambda: sys.stdout.flush())
    _quietly(lambda: print(code, file=sys.stderr))
    return 1


def _finish(code: int, deadly: int | None) -> NoReturn:
    """End as the interpreter would, without the cost of taking it apart piece by piece.

    Threads are awaited, exit handlers called, and what the program's modules hold is let go of
    (so files are flushed, and finalizers run).
    """
    _quietly(threading._shutdown)  # type: ignore[attr-defined]
    _quietly(atexit._run_exitfuncs)
    _quietly(_settle)
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        code = code if getattr(sys.stdout, "closed", True) else 120
    _quietly(lambda: sys.stderr.flush())
    if deadly is not None:
        signal.signal(deadly, signal.SIG_DFL)
        os.kill(os.getpid(), deadly)
    # From here on no handler of the program's runs any more: who is told takes it as ended.
    _signal.pthread_sigmask(_signal.SIG_BLOCK, _SIGNALS)
    kernel.marked_exit(code & 0xFF)
    os._exit(code)


def _settle() -> None:
    """Let go of what the program's own modules hold."""
    place = sys.path[-1] + "/"
    own: list[object] = [sys.modules.get("__main__")]
    # Only what was imported since the fork: to look at all others would copy their pages.
    for module in islice(reversed(sys.modules.values()), max(0, len(sys.modules) - _known)):
        path = getattr(module, "__dict__", {}).get("__file__")
        if isinstance(path, str) and path.startswith(place):
            own.append(module)
    for found in own:
        if isinstance(found, types.ModuleType):
            _empty(found.__dict__)
    gc.collect()


def _empty(names: dict[str, Any]) -> None:
    # Private names first, then the others, as the interpreter does.
    for private in (True, False):
        for name in list(names):
            if name.startswith("_") is private and name not in ("__builtins__", "__name__"):
                names[name] = None


def _quietly(action: Callable[[], object]) -> None:
    try:
        action()
    except BaseException as error:
        hook = sys.unraisablehook
        details = types.SimpleNamespace(
            exc_type=type(error),
            exc_value=error,
            exc_traceback=error.__traceback__,
            err_msg="Exception ignored at the program's end",
            object=None,
        )
        try:
            hook(details)
        except BaseException:
            return
