"""openat2(2), which Python lacks: a path that the kernel keeps below its start."""

from __future__ import annotations

import ctypes
import errno
import functools
import os

_NUMBER = 437  # on every architecture
_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
_RETRIES = 16


class _How(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


_HOW = _How(_FLAGS, 0, _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS)
_libc = ctypes.CDLL(None, use_errno=True)


def directory(start: int, path: str) -> int:
    """A descriptor of the directory `path` below the directory `start`.

    OSError: ELOOP at any link on the way, EXDEV where it leads out of `start`.
    """
    for _ in range(_RETRIES):
        opened: int = _libc.syscall(
            ctypes.c_long(_NUMBER),
            ctypes.c_int(start),
            ctypes.c_char_p(os.fsencode(path)),
            ctypes.byref(_HOW),
            ctypes.c_size_t(ctypes.sizeof(_HOW)),
        )
        if opened >= 0:
            return opened
        number = ctypes.get_errno()
        # EAGAIN: something was renamed meanwhile, so the kernel cannot be sure.
        if number not in (errno.EAGAIN, errno.EINTR):
            break
    raise OSError(number, os.strerror(number), path)


@functools.cache
def available() -> bool:
    """Whether the kernel has it (Linux 5.6), and no filter of the service's bars it."""
    start = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.close(directory(start, "."))
    except OSError:
        return False
    finally:
        os.close(start)
    return True
