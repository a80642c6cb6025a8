"""The regular files of the sandbox, within bounds that hold against a hostile tree."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from nox_runner import paths
from nox_runner.directories import opened
from nox_runner.protocol import Failure, File

MAX_FILES = 10_000
MAX_EXAMINED = 100_000
"""Directory entries of any kind."""
MAX_NAMES = 2 << 20
"""Bytes of all paths together: keeps a listing within one header frame, JSON escapes included."""


@dataclass(frozen=True)
class Listing:
    """`truncated`: a bound was reached, or a directory could not be read."""

    files: list[File]
    versions: dict[str, tuple[int, int, int, int]]
    """By path what changes whenever the file does: device, inode, size, time of change in ns."""
    truncated: bool


def take(sandbox: str) -> Listing:
    """List the regular files, sorted by path. Links are neither listed nor followed.

    Names that are not UTF-8 are shown with replacement characters.
    """
    files: list[File] = []
    versions: dict[str, tuple[int, int, int, int]] = {}
    truncated = False
    examined = names = 0
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        directory = waiting.pop()
        try:
            for name, state in _entries(sandbox, directory):
                examined += 1
                path = paths.shown("/".join((*directory, name)))
                size = len(path.encode())
                if size > paths.MAX_PATH:
                    truncated = True
                    continue
                if examined > MAX_EXAMINED or len(files) >= MAX_FILES or names > MAX_NAMES:
                    return Listing(sorted(files, key=_path), versions, True)
                if state is None:
                    waiting.append((*directory, name))
                    continue
                names += size
                files.append(File(path, state.st_size, state.st_mtime))
                versions[path] = (state.st_dev, state.st_ino, state.st_size, state.st_ctime_ns)
        except (Failure, OSError):
            if not directory:
                raise  # the sandbox itself
            truncated = True  # gone, replaced by a link, or closed to us in the meantime
    return Listing(sorted(files, key=_path), versions, truncated)


def remove_leftovers(sandbox: str) -> int:
    """Remove what uploads left that a crash cut off, in the first MAX_EXAMINED entries; how many.

    For the start, when no upload can be under way.
    """
    removed = examined = 0
    waiting: list[tuple[str, ...]] = [()]
    while waiting and examined < MAX_EXAMINED:
        directory = waiting.pop()
        with suppress(Failure, OSError), opened(sandbox, directory) as descriptor:
            for entry in os.scandir(descriptor):
                examined += 1
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((*directory, entry.name))
                elif entry.name.startswith(paths.TEMPORARY_PREFIX):
                    os.unlink(entry.name, dir_fd=descriptor)
                    removed += 1
    return removed


def changed(before: Listing, after: Listing, limit: int) -> list[File]:
    """The files that are new or different in `after`, at most `limit`."""
    different = [
        file for file in after.files if before.versions.get(file.path) != after.versions[file.path]
    ]
    return different[:limit]


def _entries(
    sandbox: str, directory: tuple[str, ...]
) -> Iterator[tuple[str, os.stat_result | None]]:
    """Name and state of each regular file, name and None of each directory."""
    with opened(sandbox, directory) as descriptor, os.scandir(descriptor) as entries:
        for entry in entries:
            if entry.name.startswith(paths.TEMPORARY_PREFIX):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield entry.name, None
            elif entry.is_file(follow_symlinks=False):
                try:
                    yield entry.name, entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue


def _path(file: File) -> str:
    return file.path
