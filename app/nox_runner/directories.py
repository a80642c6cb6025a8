"""Directories of the sandbox by descriptor, one component at a time.

Runs own the sandbox and may plant a link anywhere at any moment. So no path is ever given to the
kernel to follow as it likes: each component is opened by its name in the directory before it, never
following a link, and what was checked is the very thing that is used. Where the kernel has openat2,
it does that walk by itself in one call.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from nox_runner import openat2
from nox_runner.log import log
from nox_runner.protocol import Failure

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MODE = 0o755


def give_back(sandbox: str) -> None:
    """Let the owner read, write and enter the sandbox's own directory again.

    It belongs to the runs' user, so one of them may have taken that away, from all others.
    """
    with suppress(OSError):
        if restore_rights(sandbox):
            log("warning", "sandbox_given_back")


def restore_rights(directory: str | int) -> bool:
    """Give the owner all rights in a directory, by path or descriptor; whether one was missing."""
    mode = stat.S_IMODE(os.stat(directory).st_mode)
    missing = mode & stat.S_IRWXU != stat.S_IRWXU
    if missing:
        os.chmod(directory, mode | stat.S_IRWXU)
    return missing


@contextmanager
def opened(sandbox: str, parts: Sequence[str], create: bool = False) -> Iterator[int]:
    """A descriptor of the directory `parts` below `sandbox`, closed at the end.

    With `create` the missing ones are made (mode 0755). Raises Failure: `not_found`,
    `not_regular` if a link or another thing that is no directory is in the way, `denied`,
    `no_space`, `unable` if the sandbox itself is missing.
    """
    # The sandbox's own path is the operator's, so links in it are welcome.
    try:
        current = os.open(sandbox, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise Failure("unable", f"the sandbox cannot be opened: {error.strerror}") from None
    try:
        walk = _at_once if openat2.available() else _one_by_one
        entered = walk(current, parts, create)
        os.close(current)
        current = entered
        yield current
    finally:
        os.close(current)


def _at_once(start: int, parts: Sequence[str], create: bool) -> int:
    """The directory by one call, in which the kernel refuses every link and every way out."""
    path = "/".join(parts) or "."
    try:
        return openat2.directory(start, path)
    except OSError as error:
        if error.errno == errno.ENOENT and not create:
            raise Failure("not_found", f"{path!r} does not exist") from None
    # To make what is missing, and to name the component that is in the way.
    return _one_by_one(start, parts, create)


def _one_by_one(start: int, parts: Sequence[str], create: bool) -> int:
    current = os.dup(start)
    try:
        for part in parts:
            following = _enter(current, part, create)
            os.close(current)
            current = following
        return os.dup(current)
    finally:
        os.close(current)


def _enter(directory: int, name: str, create: bool) -> int:
    with failures(name):
        if create:
            with suppress(FileExistsError):
                os.mkdir(name, _MODE, dir_fd=directory)
        return os.open(name, DIRECTORY, dir_fd=directory)


@contextmanager
def failures(name: str) -> Iterator[None]:
    """Turn an OSError met with the component `name` into the Failure that tells it."""
    try:
        yield
    except OSError as error:
        raise _failure(error, name) from None


def _failure(error: OSError, name: str) -> Failure:
    if error.errno == errno.ENOENT:
        return Failure("not_found", f"{name!r} does not exist")
    if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO):
        return Failure("not_regular", f"{name!r} is a link, a directory or a special file")
    if error.errno == errno.EEXIST:
        return Failure("exists", f"{name!r} exists")
    if error.errno == errno.ENOTEMPTY:
        return Failure("not_empty", f"{name!r} is a directory that is not empty")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EAGAIN):
        return Failure("denied", f"{name!r}: {error.strerror}")
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Failure("no_space", f"{name!r}: {error.strerror}")
    return Failure("internal", f"{name!r}: {error.strerror}")
