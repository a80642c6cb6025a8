"""The system calls that a run may make, compiled to a filter for this machine's processor.

An allow-list: what is not named here gets EPERM, as a program without privileges would expect.
libseccomp turns names into the processor's numbers; systemd needs it, so every supported host
has it.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from nox_runner.zygote import kernel

_NAMES = """
    _llseek _newselect accept accept4 access alarm arch_prctl bind brk cachestat capget capset chdir
    chmod chown clock_getres clock_gettime clock_nanosleep close close_range connect copy_file_range
    creat dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2
    epoll_wait epoll_wait_old eventfd eventfd2 execve execveat exit exit_group faccessat faccessat2
    fadvise64 fallocate fchdir fchmod fchmodat fchmodat2 fchown fchownat fcntl fdatasync fgetxattr
    flistxattr flock fork fstat fstatfs fsync ftruncate futex futex_requeue futex_wait futex_waitv
    futex_wake futimesat get_mempolicy get_robust_list get_thread_area getcpu getcwd getdents
    getdents64 getegid geteuid getgid getgroups getitimer getpeername getpgid getpgrp getpid getppid
    getpriority getrandom getresgid getresuid getrlimit getrusage getsid getsockname getsockopt
    gettid gettimeofday getuid getxattr inotify_add_watch inotify_init inotify_init1
    inotify_rm_watch ioctl ioprio_get kill landlock_add_rule landlock_create_ruleset
    landlock_restrict_self lchown lgetxattr link linkat listen listxattr llistxattr lseek lstat
    madvise map_shadow_stack mbind membarrier memfd_create mincore mkdir mkdirat mknod mknodat mlock
    mlock2 mlockall mmap mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend
    mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync munlock munlockall munmap nanosleep
    newfstatat open openat openat2 pause pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc
    pkey_free pkey_mprotect poll ppoll pread64 preadv preadv2 process_mrelease pselect6 pwrite64
    pwritev pwritev2 read readahead readlink readlinkat readv recvfrom recvmmsg recvmsg
    remap_file_pages rename renameat renameat2 restart_syscall riscv_flush_icache rmdir rseq
    rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend
    rt_sigtimedwait rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min
    sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval
    sched_yield seccomp select semctl semget semop semtimedop sendfile sendmmsg sendmsg sendto
    set_mempolicy set_robust_list set_thread_area set_tid_address setfsgid setfsuid setgid setgroups
    setitimer setpgid setregid setresgid setresuid setreuid setrlimit setsid setsockopt setuid shmat
    shmctl shmdt shmget shutdown sigaltstack signalfd signalfd4 splice stat statfs statx symlink
    symlinkat sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete
    timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime
    times tkill truncate umask uname unlink unlinkat utime utimensat utimes vfork vmsplice wait4
    waitid write writev
"""

# What it takes beside them to make a sandbox, so the zygote may do it: `clone` with any flags.
_MAKING = "mount setns unshare clone"

# What the init of the zygote's processes does: say that it is there, and nothing from then on; and
# what an interpreter does beside that.
_INIT_NAMES = """
    brk close exit exit_group futex madvise mmap mprotect mremap munmap pause ppoll rt_sigprocmask
    rt_sigreturn write
"""

# Younger than the libseccomp of the oldest hosts. From 424 on all processors share the numbers.
_YOUNG = {
    "cachestat": 451,
    "fchmodat2": 452,
    "map_shadow_stack": 453,
    "futex_wake": 454,
    "futex_wait": 455,
    "futex_requeue": 456,
    "mseal": 462,
}
# What libraries try and do without when told that the kernel does not have it. The flags of
# clone3 are in memory, where no filter sees them; the C library then takes clone.
_ABSENT = (435, *range(463, 512))
# Programs that copy attributes go on without them. A run could else have all files in the shared
# directory made without any rights (a default ACL); names of attributes no filter can see.
_UNSUPPORTED = "setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr"

# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET; and CLONE_PARENT, since the
# parent of a run's first process is the runner, which knows nothing of other children.
_REFUSED_FLAGS = 0x7E020000 | 0x8000
_UNIX, _INET, _INET6, _NETLINK, _NETLINK_ROUTE = 1, 2, 10, 16, 0
_ALLOW = 0x7FFF0000
_NOTIFY = 0x7FC00000
_OPTIMIZE = 8
_NOT_EQUAL, _EQUAL, _MASKED_EQUAL = 1, 4, 7
_PR_SET_DUMPABLE = 4
_UPPER = 0xFFFFFFFF00000000


class _Compare(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    )


_CONDITIONAL: dict[str, tuple[tuple[_Compare, ...], ...]] = {
    "clone": ((_Compare(0, _MASKED_EQUAL, _REFUSED_FLAGS, 0),),),
    # All but PR_SET_DUMPABLE with 0: nobody but root could look at the process any more, and so the
    # quota couldn't tell what it holds. The kernel takes the option's lower half alone, so it is
    # told by the bits in which another one differs.
    "prctl": (
        (_Compare(1, _NOT_EQUAL, 0),),
        *(
            (_Compare(0, _MASKED_EQUAL, 1 << bit, ~_PR_SET_DUMPABLE & 1 << bit),)
            for bit in range(32)
        ),
    ),
    "personality": ((_Compare(0, _EQUAL, 0),), (_Compare(0, _EQUAL, 0xFFFFFFFF),)),
    # Only its own: the limits of the sandbox's init are not a run's to change.
    "prlimit64": ((_Compare(0, _EQUAL, 0),),),
    # Only its own: else a run could keep the sandbox's init from the cores it needs to end the run.
    **{
        f"sched_set{what}": ((_Compare(0, _EQUAL, 0),),)
        for what in ("affinity", "attr", "param", "scheduler")
    },
    "setpriority": ((_Compare(0, _EQUAL, 0), _Compare(1, _EQUAL, 0)),),
    "socket": (
        *((_Compare(0, _EQUAL, family),) for family in (_UNIX, _INET, _INET6)),
        (_Compare(0, _EQUAL, _NETLINK), _Compare(2, _EQUAL, _NETLINK_ROUTE)),
    ),
    "socketpair": ((_Compare(0, _EQUAL, _UNIX),),),
}


def program() -> bytes:
    """The filter for runs as classic BPF, for prctl(PR_SET_SECCOMP) and bubblewrap's --seccomp.

    OSError if libseccomp is missing or refuses.
    """
    return _compile(_NAMES, _CONDITIONAL)


def zygote_program() -> bytes:
    """The filter for the zygote, which a run's process inherits: what `program` allows, and the
    calls that make a sandbox.

    The kernel checks and compiles the long list once so, and not for each run.
    """
    making = _MAKING.split()
    rest = {name: rules for name, rules in _CONDITIONAL.items() if name not in making}
    return _compile(f"{_NAMES} {_MAKING}", rest)


def rest_program(*, telling: bool) -> bytes:
    """What a run gets on top of the zygote's: no more of the calls that make a sandbox.

    Of two filters the stricter one counts, so both together are `program`. With `telling` a
    listener is told of an exit that is marked with kernel.MARK. The kernel takes an exit code's
    lower half alone, so the mark changes nothing; and the exits of other programs, which don't
    carry it, cost nothing.
    """
    with _context(_ALLOW) as (library, context):
        for name in _MAKING.split():
            number = library.seccomp_syscall_resolve_name(name.encode())
            if name == "clone":
                for bit in range(_REFUSED_FLAGS.bit_length()):
                    if flag := _REFUSED_FLAGS & 1 << bit:
                        found = (_Compare(0, _MASKED_EQUAL, flag, flag),)
                        _add(library, context, _error(errno.EPERM), number, found)
            elif name not in _NAMES.split():
                _add(library, context, _error(errno.EPERM), number, ())
        if telling:
            number = library.seccomp_syscall_resolve_name(b"exit_group")
            marked = (_Compare(0, _MASKED_EQUAL, _UPPER, kernel.MARK),)
            _add(library, context, _NOTIFY, number, marked)
        return _export(library, context)


def init_program() -> bytes:
    """The filter for the init of the zygote's processes, which needs next to nothing."""
    return _compile(_INIT_NAMES, {})


def _compile(names: str, conditional: dict[str, tuple[tuple[_Compare, ...], ...]]) -> bytes:
    """Allow `names`, and `conditional` where one of the comparisons holds."""
    with _context(_error(errno.EPERM)) as (library, context):
        _check(library.seccomp_attr_set(context, _OPTIMIZE, 2), "optimize", tolerant=True)
        for name in names.split():
            number = library.seccomp_syscall_resolve_name(name.encode())
            _add(library, context, _ALLOW, number if number >= 0 else _YOUNG.get(name, -1), ())
        for name, alternatives in conditional.items():
            number = library.seccomp_syscall_resolve_name(name.encode())
            for comparisons in alternatives:
                _add(library, context, _ALLOW, number, comparisons)
        for number in _ABSENT:
            _add(library, context, _error(errno.ENOSYS), number, ())
        for name in _UNSUPPORTED.split():
            number = library.seccomp_syscall_resolve_name(name.encode())
            _add(library, context, _error(errno.EOPNOTSUPP), number, ())
        return _export(library, context)


@contextmanager
def _context(otherwise: int) -> Iterator[tuple[ctypes.CDLL, ctypes.c_void_p]]:
    """libseccomp, and a filter to add to that does `otherwise` with calls it has no rule for."""
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    context = ctypes.c_void_p(library.seccomp_init(otherwise))
    if not context:
        raise OSError("libseccomp cannot make a filter for this processor")
    try:
        yield library, context
    finally:
        library.seccomp_release(context)


def _add(
    library: ctypes.CDLL,
    context: ctypes.c_void_p,
    action: int,
    number: int,
    comparisons: tuple[_Compare, ...],
) -> None:
    if number < 0:
        return  # a call that this processor never had
    array = (_Compare * len(comparisons))(*comparisons)
    result = library.seccomp_rule_add_array(
        context, ctypes.c_uint32(action), number, len(comparisons), array
    )
    _check(result, f"the rule for call {number}")


def _export(library: ctypes.CDLL, context: ctypes.c_void_p) -> bytes:
    descriptor = os.memfd_create("seccomp")
    try:
        _check(library.seccomp_export_bpf(context, descriptor), "export")
        size = os.fstat(descriptor).st_size
        return os.pread(descriptor, size, 0)
    finally:
        os.close(descriptor)


def _error(number: int) -> int:
    return 0x00050000 | number


def _check(result: int, what: str, *, tolerant: bool = False) -> None:
    if result < 0 and not tolerant:
        raise OSError(-result, f"libseccomp: {what}: {os.strerror(-result)}")
