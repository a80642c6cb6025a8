"""System calls that the standard library does not offer, each raising OSError."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import platform
import socket
import struct
from collections.abc import Callable

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
_CLONE_VM, _CLONE_FILES, _CLONE_PIDFD, _CLONE_PARENT = 0x100, 0x400, 0x1000, 0x8000
_CLONE_CHILD_CLEARTID, _CLONE_CHILD_SETTID = 0x00200000, 0x01000000
SIGKILL = 9
_SIGCHLD = 17

MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
_MNT_DETACH = 2
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC = 1, 2, 4, 8
_AT_RECURSIVE = 0x8000

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NAME = 1, 4, 15
_PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_GET_TID_ADDRESS = 22, 24, 38, 40
_SECCOMP_MODE_FILTER = 2
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_NEW_LISTENER = 1, 8
MARK = 0x4E6F7821 << 32
"""In the upper half of an exit's code, which the kernel ignores: the exit is to be told of."""
_CAPABILITY_VERSION_3 = 0x20080522
_STACK = 64 << 10

_NUMBERS = {
    "x86_64": {
        **{"clone": 56, "pivot_root": 155, "exit_group": 231, "set_robust_list": 273},
        **{"get_robust_list": 274, "seccomp": 317},
    },
    "aarch64": {
        **{"clone": 220, "pivot_root": 41, "exit_group": 94, "set_robust_list": 99},
        **{"get_robust_list": 100, "seccomp": 277},
    },
}
# The same on every processor:
_MOUNT_SETATTR = 442
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446

LANDLOCK_REFER = 1 << 13
LANDLOCK_TRUNCATE = 1 << 14
LANDLOCK_DEVICES = 1 << 6 | 1 << 11
LANDLOCK_READ = 1 << 0 | 1 << 2 | 1 << 3
LANDLOCK_WRITE = 1 << 1
LANDLOCK_ALL = (1 << 14) - 1
"""What version 2 knows of: from execution to renaming across directories."""
# PyDLL keeps the interpreter's lock over the call: a new process must find it held by itself.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_prctl = _libc.prctl
_prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
# Looked up here: in each sandbox anew it would take longer than the call.
_capset = _libc.capset


def _number(name: str) -> int:
    try:
        return _NUMBERS[platform.machine()][name]
    except KeyError:
        raise OSError(f"processor {platform.machine()}: not known here") from None


def _check(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


class ForkHooks:
    """What modules have registered to be called around a fork, from when this is made to `close`.

    `threading` is left out: in the new process it looks after other threads and the locks they
    held, and makes its own anew. Where there are no other threads that changes nothing, and costs
    copies of a hundred memory pages.
    """

    def __init__(self) -> None:
        self.before: list[Callable[[], object]] = []
        self.in_parent: list[Callable[[], object]] = []
        self.in_child: list[Callable[[], object]] = []
        self._register = os.register_at_fork
        os.register_at_fork = self._note  # type: ignore[assignment]

    def _note(self, **hooks: Callable[[], object]) -> None:
        # For a program's own forks.
        self._register(**hooks)
        kinds = {
            "before": self.before,
            "after_in_parent": self.in_parent,
            "after_in_child": self.in_child,
        }
        for kind, hook in hooks.items():
            if getattr(hook, "__module__", "") != "threading":
                kinds[kind].append(hook)

    def close(self) -> None:
        """Take note of no more."""
        os.register_at_fork = self._register


class Fork:
    """os.fork, but into fresh namespaces, and the new process is a sibling: a child of the parent.

    Only for a process with a single thread; made by one that was not made by this, and used by its
    descendants, too. Neither the interpreter nor the C library is told: what they do at a fork is
    to look after other threads, and after locks that those hold. What they keep of the thread's
    number and its list of locks is kept right. Of hooks only `hooks` are called.
    """

    def __init__(self, hooks: ForkHooks) -> None:
        self._hooks = hooks
        self._call = _libc.syscall
        self._clone = ctypes.c_long(_number("clone"))
        self._set_robust_list = ctypes.c_long(_number("set_robust_list"))
        self._locks, self._size = ctypes.c_void_p(), ctypes.c_size_t()
        get = ctypes.c_long(_number("get_robust_list"))
        found = _libc.syscall(get, 0, ctypes.byref(self._locks), ctypes.byref(self._size))
        _check(found, "get_robust_list")
        self._flags = _CLONE_PARENT | _CLONE_PIDFD | _SIGCHLD
        thread, none = ctypes.c_void_p(), ctypes.c_long(0)
        if _prctl(_PR_GET_TID_ADDRESS, ctypes.addressof(thread), 0, 0, 0) == 0:
            self._flags |= _CLONE_CHILD_SETTID | _CLONE_CHILD_CLEARTID
        self._pidfd = ctypes.c_int(-1)
        # The last two are the other way round on other processors; of the two only one is used.
        last = (thread, none) if platform.machine() == "x86_64" else (none, thread)
        self._rest = none, ctypes.byref(self._pidfd), *last

    def __call__(self, namespaces: int) -> tuple[int, int]:
        """(0, -1) in the new process, (pid, pidfd) in the old one."""
        hooks = self._hooks
        flags = ctypes.c_ulong(namespaces | self._flags)
        for hook in reversed(hooks.before):
            hook()
        pid = self._call(self._clone, flags, *self._rest)
        if pid == 0:
            self._call(self._set_robust_list, self._locks, self._size)
            for hook in hooks.in_child:
                hook()
            return 0, -1
        for hook in hooks.in_parent:
            hook()
        return _check(pid, "clone"), self._pidfd.value


class Idle:
    """Starts processes that do nothing but be there: the init of a sandbox's processes.

    One shares this process's memory and descriptors, and goes from the C library's `clone` right
    into its `pause`, so it costs next to nothing. It never comes back from there, and so never
    uses the stack, which they all share: a signal without a handler does nothing to an init. So
    this process must have handlers for none. For the process that makes it: no fork has the stack.
    """

    def __init__(self) -> None:
        # Private, and not the forks' even to read: it is where an init finds what it is to do.
        self._memory = mmap.mmap(-1, _STACK, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_DONTFORK)
        self._stack = ctypes.addressof(ctypes.c_char.from_buffer(self._memory)) + _STACK
        self._pause = ctypes.cast(_libc.pause, ctypes.c_void_p)
        self._clone = _libc.clone
        self._clone.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p,
                                ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)  # fmt: skip
        self._flags = _CLONE_VM | _CLONE_FILES | _CLONE_PIDFD | _SIGCHLD
        self._pidfd = ctypes.c_int(-1)

    def __call__(self) -> int:
        """The pidfd of a new one."""
        pidfd = ctypes.addressof(self._pidfd)
        pid = self._clone(self._pause, self._stack, self._flags, None, pidfd, None, None)
        _check(pid, "clone")
        return self._pidfd.value


def unshare_pids() -> None:
    """Have this process's next child be the first of a fresh pid namespace, and others follow."""
    unshare(CLONE_NEWPID)


def return_pids(own: int) -> None:
    """Have later children be in the pid namespace `own` again, this process's: a descriptor."""
    _check(_libc.setns(own, CLONE_NEWPID), "setns")


def unshare(namespaces: int) -> None:
    """Move this process to fresh namespaces."""
    _check(_libc.unshare(ctypes.c_int(namespaces)), "unshare")


def map_ids(uid: int, gid: int) -> None:
    """In a fresh user namespace, map the own user and group to themselves, nothing else."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        write(f"/proc/self/{name}", text)


def write(path: str, text: str) -> None:
    """Write to a file that is there."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """mount(2)."""
    Mounts([(source, target, kind, flags, data)])()


class Mounts:
    """Mounts that are to be made one after the other: source, target, kind, flags, data of each.

    All objects that takes are made with this, not when it is called (see Seal).
    """

    def __init__(self, wanted: list[tuple[str, str, str, int, str]]) -> None:
        self._calls = [
            (
                f"mount {kind or 'bind'} {target}",
                functools.partial(
                    _libc.mount,
                    source.encode(),
                    target.encode(),
                    kind.encode(),
                    ctypes.c_ulong(flags),
                    data.encode() if data else None,
                ),
            )
            for source, target, kind, flags, data in wanted
        ]

    def __call__(self) -> None:
        """OSError if one cannot be made."""
        for what, call in self._calls:
            _check(call(), what)


def bind(source: str, target: str) -> None:
    """Show `source` and all that is mounted in it at `target`."""
    mount(source, target, "", MS_BIND | MS_REC)


def restrict(target: str, attributes: int, *, recursive: bool) -> None:
    """Add mount attributes (ATTR_*) to a mount, and to all below it if `recursive`."""
    packed = struct.pack("=4Q", attributes, 0, 0, 0)
    result = _libc.syscall(
        ctypes.c_long(_MOUNT_SETATTR),
        ctypes.c_int(-100),
        target.encode(),
        ctypes.c_uint(_AT_RECURSIVE if recursive else 0),
        packed,
        ctypes.c_size_t(len(packed)),
    )
    _check(result, f"mount_setattr {target}")


def pivot(new_root: str, old_root: str) -> None:
    """pivot_root(2)."""
    result = _libc.syscall(
        ctypes.c_long(_number("pivot_root")), new_root.encode(), old_root.encode()
    )
    _check(result, f"pivot_root {new_root}")


def detach(target: str) -> None:
    """Unmount lazily."""
    _check(_libc.umount2(target.encode(), ctypes.c_int(_MNT_DETACH)), f"umount {target}")


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument."""
    _check(_prctl(option, value, 0, 0, 0), "prctl")


def landlock_version() -> int:
    """Of Landlock's interface, 0 where the kernel has none or a filter of the service's bars it."""
    version: int = _libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    return max(0, version)


def landlock(rights: dict[str, int], handled: int) -> None:
    """Allow, of the `handled` rights to files, only `rights` below each path; for good.

    Needs no_new_privs, or CAP_SYS_ADMIN in the own user namespace.
    """
    packed = struct.pack("=Q", handled)
    rules = _libc.syscall(_LANDLOCK_CREATE, packed, ctypes.c_size_t(8), ctypes.c_uint(0))
    _check(rules, "landlock_create_ruleset")
    try:
        for path, allowed in rights.items():
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", allowed, place)
            _check(_libc.syscall(_LANDLOCK_ADD, rules, 1, rule, 0), "landlock_add_rule")
            os.close(place)
        _check(_libc.syscall(_LANDLOCK_RESTRICT, rules, 0), "landlock_restrict_self")
    finally:
        os.close(rules)


class Filter:
    """Gives up the system calls that `program`, a seccomp filter, does not allow; for good.

    Needs no_new_privs, or CAP_SYS_ADMIN in the own user namespace.
    """

    def __init__(self, program: bytes) -> None:
        self._program = _Program(len(program) // 8, program)
        self._address = ctypes.addressof(self._program)

    def __call__(self) -> None:
        sealed = _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, self._address, 0, 0)
        _check(sealed, "giving up system calls")


class Seal:
    """Gives up every privilege of the process that calls it, for good: capabilities, new ones by
    set-user-ID files, and the system calls that `program`, a seccomp filter, does not allow.

    With `telling`, the same filter but for calls that a listener is to be told of, that one is used
    where it can be.

    All objects that takes are made here, once, by the zygote: what a fork has to make itself costs
    it copies of memory pages.
    """

    def __init__(self, program: bytes, telling: bytes = b"") -> None:
        with open("/proc/sys/kernel/cap_last_cap") as file:
            self._capabilities = range(int(file.read()) + 1)
        self._header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
        self._none = bytes(24)
        self._filter = Filter(program)
        self._telling = _Program(len(telling) // 8, telling) if telling else None
        self._telling_filter = ctypes.byref(self._telling) if self._telling else None
        self._seccomp = ctypes.c_long(_number("seccomp"))
        self._flag = ctypes.c_ulong(_SECCOMP_FILTER_FLAG_NEW_LISTENER)

    def __call__(self) -> int:
        """The listener's descriptor, -1 if there is none. OSError if something is refused."""
        failed = 0
        for capability in self._capabilities:
            failed |= _prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
        # Without permitted capabilities the kernel empties the ambient set by itself.
        failed |= _capset(self._header, self._none)
        failed |= _prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        _check(failed, "giving up privileges")
        if self._telling_filter is not None:
            found: int = _libc.syscall(
                self._seccomp, _SECCOMP_SET_MODE_FILTER, self._flag, self._telling_filter
            )
            if found >= 0:
                return found
        # Another one listens already, or the kernel or the service's own filter has no such thing.
        self._filter()
        return -1


class Loopback:
    """Brings up the loopback of the own network namespace, which is fresh."""

    def __init__(self) -> None:
        self._kind = int(socket.AF_NETLINK), int(socket.SOCK_RAW), 0
        # RTM_NEWLINK (request, acknowledge) of interface 1, the loopback: up.
        self._up = struct.pack("=IHHII", 32, 16, 5, 1, 0) + struct.pack("=BxHiII", 0, 0, 1, 1, 1)
        self._answer = ctypes.create_string_buffer(1024)
        # A function is made when it is looked up first.
        self._socket, self._send, self._receive = _libc.socket, _libc.send, _libc.recv

    def __call__(self) -> None:
        """OSError if it does not come up."""
        link = _check(self._socket(*self._kind), "socket")
        _check(self._send(link, self._up, len(self._up), 0), "send")
        _check(self._receive(link, self._answer, len(self._answer), 0), "recv")
        os.close(link)
        (error,) = struct.unpack_from("=i", self._answer, 16)
        if error:
            raise OSError(-error, f"the loopback does not come up: {os.strerror(-error)}")


_EXIT_GROUP = ctypes.c_long(_number("exit_group"))


def marked_exit(code: int) -> None:
    """End the process with `code`. Returns only if somebody was to be told and is gone."""
    _libc.syscall(_EXIT_GROUP, ctypes.c_ulong(MARK | code))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))
