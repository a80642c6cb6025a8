"""One sandbox from the inside: the process that becomes the program.

It is process 2 of its pid namespace, and the runner's child, which so learns from the kernel how
the program ended. Process 1 is the zygote's (`kernel.Idle`): it does nothing, and with it all end.
The program cannot reach it: it is of another user namespace and not dumpable (so /proc/1 and ptrace
are closed), and a namespace's init gets no signal from inside that it has no handler for.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket
import _weakref
import array
import atexit
import builtins
import functools
import gc
import marshal
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

READY = struct.Struct("=q")
"""CPU time in µs that was spent before the job. With it come the descriptors of what FILES names,
and, where the kernel tells of an exit ahead, of that notice's listener."""
JOB = struct.Struct("=I")
"""Length of the text of a job, which `encode` gives; with it come the descriptors."""
FILES = ("1/stat", "1/task/1/children", "self/status", "thread-self/children", "self/stat")
"""Below /proc: what tells, at its exit, whether the program is alone, and what it has used."""
FAILED = b"E"
"""Begins what is told in place of READY when a sandbox cannot be made."""

# Apart from these: that of processes, which is made before, and that of users, which comes last. So
# no namespace but the latter belongs to it, and capabilities in it are none over the others.
NAMESPACES = (
    kernel.CLONE_NEWNS
    | kernel.CLONE_NEWNET
    | kernel.CLONE_NEWIPC
    | kernel.CLONE_NEWUTS
    | kernel.CLONE_NEWCGROUP
)
_PLACE = "/run/nox"
_KERNEL_FILES = (
    # Where the host runs out of memory, runs should die before the services. Only a hint: a run
    # may take it back.
    ("/proc/self/oom_score_adj", "1000"),
    # The filter forbids namespaces too; a second wall costs nothing.
    ("/proc/sys/user/max_user_namespaces", "0"),
    ("/proc/sys/user/max_inotify_instances", "16"),
    ("/proc/sys/user/max_inotify_watches", "4096"),
)
_SIGNALS = _signal.valid_signals()
_MARSHAL = 4
"""The version that every Python from 3.4 on writes and reads."""
_DESCRIPTORS = socket.CMSG_SPACE(4 * array.array("i").itemsize)
_known = _most = 0


def encode(language: str, path: str, args: list[str], env: dict[str, str]) -> bytes:
    """What JOB announces. Not JSON, whose reader is Python code and a regular expression."""
    return marshal.dumps((language, path, args, env), _MARSHAL)


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
    global _known, _most
    _most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    # stderr stays, for what the zygote itself may have to say: a program gets another one.
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in range(2):
        os.dup2(null, descriptor)
    os.close(null)
    # What was printed before a timeout is worth having.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    # In its pid namespace every program's process has this number.
    threading.main_thread()._native_id = 2  # type: ignore[attr-defined]
    os.environ.clear()
    os.environ.update(config["environment"])
    config["mounts"] = kernel.Mounts(_mounts(config))
    _known = len(sys.modules)
    gc.collect()
    # What is there now is not looked at again by any collection, so its pages stay shared. And
    # none takes place before a program begins.
    gc.freeze()
    gc.disable()


def live(config: dict[str, Any], job: _socket.socket, rehearse: bool) -> NoReturn:
    """Build the rest of the sandbox, become the program when it comes, and end."""
    try:
        kernel.prctl(kernel.PR_SET_DUMPABLE, 1)
        # By the C function: signal.signal() makes enumerations of its arguments, which writes to
        # a hundred pages.
        _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
        for number, handler in config["handlers"]:
            _signal.signal(number, handler)
        told = _build(config, job)
        _prepare(rehearse)
        _become_program(config, job, told)
    except BaseException as error:
        job.send(FAILED + str(error).encode()[:4000])
    finally:
        os._exit(126)


def _build(config: dict[str, Any], job: _socket.socket) -> list[int]:
    """Make the rest of the sandbox, and give up what that took; the descriptors for READY."""
    close_all_but(job.fileno())
    os.setsid()
    _mount(config)
    if not config["network"]:
        config["loopback"]()
    kernel.unshare(kernel.CLONE_NEWUSER)
    kernel.map_ids(config["uid"], config["gid"])
    _limits(config)
    told = [os.open(f"/proc/{name}", os.O_RDONLY) for name in FILES]
    if config["landlock"]:
        kernel.landlock(*config["landlock"])
    listener = config["seal"]()
    if listener >= 0:
        told.append(listener)
    return told


def _mounts(config: dict[str, Any]) -> list[tuple[str, str, str, int, str]]:
    flags = kernel.MS_NOSUID | kernel.MS_NODEV
    size = f"size={config['tmp_size']},nr_inodes={config['tmp_files']}"
    # The program's own text is there as well.
    run = f"mode=0755,size={config['run_size']},nr_inodes=1024"
    # The kernel has 4096 of them for the whole machine.
    terminals = "newinstance,ptmxmode=0666,mode=620,max=64"
    return [
        ("proc", "/proc", "proc", flags | kernel.MS_NOEXEC, ""),
        ("tmpfs", "/tmp", "tmpfs", flags, f"mode=1777,{size}"),
        ("tmpfs", "/dev/shm", "tmpfs", flags, f"mode=1777,{size}"),
        ("tmpfs", "/run", "tmpfs", flags, run),
        ("devpts", "/dev/pts", "devpts", kernel.MS_NOSUID | kernel.MS_NOEXEC, terminals),
    ]


def _mount(config: dict[str, Any]) -> None:
    config["mounts"]()
    os.mkdir(_PLACE, 0o755)
    sandbox = config["sandbox"]
    if sandbox.startswith("/tmp/"):
        # Covered now, but for this process, whose working directory it is.
        os.makedirs(sandbox, 0o755)
        kernel.bind(".", sandbox)
    os.chdir(sandbox)


def _limits(config: dict[str, Any]) -> None:
    """The process's own, and those of its user namespace, below the user's, which all share."""
    for which, value in config["own_limits"]:
        resource.prlimit(0, which, (value, value))
    for path, text in _KERNEL_FILES:
        try:
            kernel.write(path, text)
        except FileNotFoundError:
            continue


def close_all_but(kept: int) -> None:
    """Close all descriptors but `kept` and the standard ones."""
    os.closerange(3, kept)
    os.closerange(kept + 1, _most)


def _prepare(rehearse: bool) -> None:
    os.umask(0o022)
    # Python's own random was by its hook (kernel.ForkHooks).
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    sys.path.append(os.getcwd())
    if rehearse:
        _rehearse()


def _become_program(config: dict[str, Any], job: _socket.socket, told: list[int]) -> NoReturn:
    used = resource.getrusage(resource.RUSAGE_SELF)
    ready = READY.pack(round((used.ru_utime + used.ru_stime) * 1e6))
    _send(job, ready, told)
    # The listener above all: a program must not be the one who is told.
    for descriptor in told:
        os.close(descriptor)
    for which, value in config["last_limits"]:
        resource.prlimit(0, which, (value, value))
    language, path, args, env, descriptors = _receive(job)
    job.close()
    source, *streams = descriptors
    # In front of the first: stdin is the null device already, and may stay that.
    for number, descriptor in enumerate(streams, start=3 - len(streams)):
        os.dup2(descriptor, number)
    text = os.pread(source, os.fstat(source).st_size, 0)
    os.closerange(3, max(descriptors) + 1)
    _set_environment(env)
    _write(path, text)
    if language == "sh":
        # As a shell expects them; Python ignores both.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        os.execv("/bin/sh", ["/bin/sh", path, *args])
    sys.argv = [path, *args]
    gc.enable()
    _finish(*_python(text, path))


def _send(job: _socket.socket, message: bytes, descriptors: list[int]) -> None:
    rights = array.array("i", descriptors)
    job.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


def _receive(job: _socket.socket) -> tuple[str, str, list[str], dict[str, str], list[int]]:
    """What `encode` was given, and the descriptors that came with it."""
    text, ancillary, _, _ = job.recvmsg(1 << 16, _DESCRIPTORS)
    if len(text) < JOB.size:
        os._exit(0)  # never needed
    end = JOB.size + JOB.unpack_from(text)[0]
    while len(text) < end:
        piece = job.recv(end - len(text))
        if not piece:
            os._exit(0)
        text += piece
    descriptors = array.array("i", ancillary[0][2])
    return *marshal.loads(text[JOB.size :]), descriptors.tolist()


def _set_environment(added: dict[str, str]) -> None:
    # update() looks into abstract base classes first.
    for name, value in added.items():
        os.environ[name] = value


def _write(path: str, text: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    view = memoryview(text)
    while view:
        view = view[os.write(file, view) :]
    os.close(file)


def _rehearse() -> None:
    """Go the way of a job once, so that the pages it writes to are this process's own by then."""
    path = f"{_PLACE}/main.py"
    text = b"def f(x):\n    return [str(x)]\nprint(f(1))\n"
    near, far = _socket.socketpair()
    job = encode("python", path, [], {"NOX_RUN_ID": "0" * 32})
    _send(far, JOB.pack(len(job)) + job, [0, 0])
    _, _, args, env, (source, other) = _receive(near)
    near.close()
    far.close()
    os.dup2(other, source)
    os.closerange(source, other + 1)
    _set_environment(env)
    _write(path, text)
    sys.argv = [path, *args]
    _python(text, path)
    _settle()
    sys.stdout.flush()
    os.unlink(path)


def _python(text: bytes, path: str) -> tuple[int, int | None]:
    """Run a program's text as `__main__`, as bootstrap.py does; its exit code or deadly signal."""
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
        try:
            sys.excepthook(type(error), error, error.__traceback__)
        except SystemExit as end:
            return _exit_code(end), None
        except BaseException as second:
            _quietly(functools.partial(_tell_of_both, second, error))
        return 1, signal.SIGINT if isinstance(error, KeyboardInterrupt) else None
    return 0, None


def _tell_of_both(second: BaseException, error: BaseException) -> None:
    """As the interpreter does where sys.excepthook fails."""
    print("Error in sys.excepthook:", file=sys.stderr)
    sys.__excepthook__(type(second), second, second.__traceback__)
    print("\nOriginal exception was:", file=sys.stderr)
    sys.__excepthook__(type(error), error, error.__traceback__)


def _exit_code(error: SystemExit) -> int:
    code = error.code
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF if -(1 << 63) <= code < 1 << 63 else 255
    _quietly(lambda: sys.stdout.flush())
    _quietly(lambda: print(code, file=sys.stderr))
    return 1


def _finish(code: int, deadly: int | None) -> NoReturn:
    """End as the interpreter would, without the cost of taking it apart piece by piece.

    Threads are awaited, exit handlers called, and what the program's modules hold is let go of
    (so files are flushed, and finalizers run).
    """
    _quietly(_await_threads)
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
        code = 128 + deadly  # it is blocked
    # From here on no handler of the program's runs any more: who is told takes it as ended.
    _signal.pthread_sigmask(_signal.SIG_BLOCK, _SIGNALS)
    kernel.marked_exit(code & 0xFF)
    os._exit(code)


def _await_threads() -> None:
    if threading.active_count() > 1 or getattr(threading, "_threading_atexits", None):
        threading._shutdown()  # type: ignore[attr-defined]


class _Mark:
    __slots__ = ("__weakref__",)


def _settle() -> None:
    """Let go of what the program's own modules hold."""
    # First without touching them, so that a finalizer finds all names; then those that are held.
    marks = _let_go(_own_modules())
    gc.collect()
    for reference in marks:
        if (mark := reference()) is not None:
            for names in gc.get_referrers(mark):
                if isinstance(names, dict):
                    _empty(names)
            gc.collect()


def _own_modules() -> list[str]:
    place = sys.path[-1] + "/"
    names = ["__main__"]
    # Only what was imported since the fork: to look at all others would copy their pages.
    for name, module in islice(reversed(sys.modules.items()), max(0, len(sys.modules) - _known)):
        path = getattr(module, "__dict__", {}).get("__file__")
        if isinstance(path, str) and path.startswith(place):
            names.append(name)
    return names


def _let_go(names: list[str]) -> list[_weakref.ref[_Mark]]:
    """No longer keep the modules of these names. What is given lives as long as their contents."""
    marks = []
    for name in names:
        module = sys.modules.pop(name, None)
        if isinstance(module, types.ModuleType):
            module.__dict__["__mark__"] = mark = _Mark()
            marks.append(_weakref.ref(mark))
    return marks


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
