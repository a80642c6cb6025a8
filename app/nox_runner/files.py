"""Upload, download and removal of the sandbox's files."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from nox_runner import paths
from nox_runner.directories import failures, opened
from nox_runner.protocol import Failure, PutReply

_MODE = 0o644


def put(
    sandbox: str,
    path: str,
    overwrite: bool,
    content: Iterable[bytes],
    max_size: int,
    begun: Callable[[os.stat_result], None] = lambda _: None,
    stored: Callable[[os.stat_result], None] = lambda _: None,
) -> PutReply:
    """Store `content` as the file `path`, whole or not at all.

    It is written under a temporary name in the target's directory, then linked (which is atomic
    and fails if the name is taken) or, with `overwrite`, renamed onto a regular file. `begun` is
    told its state when it is made, `stored` when it is complete.
    Raises Failure: `bad_path`, `exists`, `not_regular`, `denied`, `too_large`, `no_space`.
    """
    *parents, name = _components(path)
    with opened(sandbox, parents, create=True) as directory:
        _refuse_target(directory, name, overwrite)
        temporary = paths.TEMPORARY_PREFIX + os.urandom(8).hex()
        with failures(name):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(temporary, flags, _MODE, dir_fd=directory)
        try:
            with failures(name), open(descriptor, "wb", buffering=0) as file:
                begun(os.fstat(descriptor))
                os.fchmod(descriptor, _MODE)  # whatever the umask
                size, digest = _write(file, content, max_size)
                stored(os.fstat(descriptor))
            with failures(name):
                if overwrite:
                    # A link planted since the check is replaced itself, never followed.
                    os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
                else:
                    os.link(
                        temporary,
                        name,
                        src_dir_fd=directory,
                        dst_dir_fd=directory,
                        follow_symlinks=False,
                    )
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=directory)
    return PutReply(path, size, digest)


@contextmanager
def reading(sandbox: str, path: str) -> Iterator[tuple[int, os.stat_result]]:
    """A descriptor of the regular file `path` and its state.

    Raises Failure: `bad_path`, `not_found`, `not_regular`, `denied`.
    """
    *parents, name = _components(path)
    with opened(sandbox, parents) as directory:
        # O_NONBLOCK: a FIFO without a writer would block the open itself for ever.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        with failures(name):
            descriptor = os.open(_entry(directory, name), flags, dir_fd=directory)
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise Failure("not_regular", f"{name!r} is a directory or a special file")
        yield descriptor, state
    finally:
        os.close(descriptor)


def chunks(descriptor: int, size: int, chunk: int) -> Iterator[bytes]:
    """The first `size` bytes of an open file, or fewer if it was cut since."""
    while size > 0 and (data := os.read(descriptor, min(chunk, size))):
        size -= len(data)
        yield data


def delete(sandbox: str, path: str) -> None:
    """Remove the file `path`, a link itself, or an empty directory.

    Raises Failure: `bad_path`, `not_found`, `not_regular`, `not_empty`, `denied`.
    """
    *parents, name = _components(path)
    with opened(sandbox, parents) as directory, failures(name):
        entry = _entry(directory, name)
        state = os.stat(entry, dir_fd=directory, follow_symlinks=False)
        if stat.S_ISDIR(state.st_mode):
            os.rmdir(entry, dir_fd=directory)
        else:
            os.unlink(entry, dir_fd=directory)


def _entry(directory: int, name: str) -> str:
    """What a listing shows as `name`: itself, or else the first whose name is not UTF-8.

    So what is listed can be read, and removed.
    """
    if "\ufffd" not in name:
        return name
    with os.scandir(directory) as entries:
        alike = [entry.name for entry in entries if paths.shown(entry.name) == name]
    return name if name in alike or not alike else alike[0]


def _components(path: str) -> tuple[str, ...]:
    try:
        return paths.components(path)
    except paths.PathError as error:
        raise Failure("bad_path", str(error)) from None


def _refuse_target(directory: int, name: str, overwrite: bool) -> None:
    """Refuse before the content is read what could not be stored anyway."""
    try:
        with failures(name):
            state = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except Failure as failure:
        if failure.code == "not_found":
            return
        raise
    if not stat.S_ISREG(state.st_mode):
        raise Failure("not_regular", f"{name!r} is a link, a directory or a special file")
    if not overwrite:
        raise Failure("exists", f"{name!r} exists")


def _write(file: BinaryIO, content: Iterable[bytes], max_size: int) -> tuple[int, str]:
    size, digest = 0, hashlib.sha256()
    for chunk in content:
        size += len(chunk)
        if size > max_size:
            raise Failure("too_large", f"the file is larger than {max_size} bytes")
        view = memoryview(chunk)
        while view:  # an unbuffered write may be short
            view = view[file.write(view) :]
        digest.update(chunk)
    return size, digest.hexdigest()
