"""A walk over all of the sandbox that no tree, however deep or hostile, can lead astray.

One directory is open at a time, so depth costs no descriptors and no path grows too long. No link
is followed, no other file system entered, and the way back up is checked.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from nox_runner.directories import DIRECTORY, restore_rights

OnEntry = Callable[[int, str, os.stat_result], None]
"""Told the directory's descriptor, a name in it, and its state; before that is entered."""
OnLeave = Callable[[int, str, os.stat_result], None]
"""Told the same of a directory after all that is in it."""

T = TypeVar("T")


@dataclass
class _Level:
    name: str
    state: os.stat_result
    pending: list[str] = field(default_factory=list)


def walk(sandbox: str, on_entry: OnEntry, on_leave: OnLeave | None = None) -> bool:
    """Visit everything in `sandbox`; OSError if that itself cannot be opened.

    False if some was missed: a directory was gone when its turn came, or moved away while this was
    in it, which ends the walk.
    What is not the runner's own (other file systems, directories it has no right to) is left out.
    """
    complete = True
    current = os.open(sandbox, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        levels = [_Level("", os.fstat(current))]
        device = levels[0].state.st_dev
        complete &= _read(current, levels[0], on_entry)
        while True:
            level = levels[-1]
            if level.pending:
                name = level.pending.pop()
                try:
                    entered = _enter(current, name, device)
                except (FileNotFoundError, NotADirectoryError):
                    complete = False
                    continue
                if entered is None:
                    continue
                os.close(current)
                current = entered
                levels.append(_Level(name, os.fstat(current)))
                complete &= _read(current, levels[-1], on_entry)
                continue
            levels.pop()
            if not levels:
                return complete
            above = os.open("..", DIRECTORY, dir_fd=current)
            os.close(current)
            current = above
            if not os.path.samestat(os.fstat(above), levels[-1].state):
                return False
            if on_leave is not None:
                on_leave(current, level.name, level.state)
    finally:
        os.close(current)


def _read(directory: int, level: _Level, on_entry: OnEntry) -> bool:
    complete = True
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                try:
                    state = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    complete &= not entry.is_dir(follow_symlinks=False)
                    continue
                on_entry(directory, entry.name, state)
                if stat.S_ISDIR(state.st_mode):
                    level.pending.append(entry.name)
    except OSError:
        return False
    return complete


def _enter(directory: int, name: str, device: int) -> int | None:
    """A descriptor of the directory `name`; None if it is not the runner's own.

    FileNotFoundError or NotADirectoryError if it is gone.
    """
    try:
        entered = insist(directory, lambda: _opened(directory, name))
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError:
        return None
    if os.fstat(entered).st_dev != device:
        os.close(entered)
        return None
    return entered


def insist(directory: int, action: Callable[[], T]) -> T:
    """What `action` gives, which needs the owner's rights in `directory`; those are given back if
    a run has taken them away.
    """
    try:
        return action()
    except PermissionError:
        with suppress(OSError):
            restore_rights(directory)
        return action()


def _opened(directory: int, name: str) -> int:
    try:
        return os.open(name, DIRECTORY, dir_fd=directory)
    except PermissionError:
        _open_up(directory, name)
        return os.open(name, DIRECTORY, dir_fd=directory)


def _open_up(directory: int, name: str) -> None:
    """Give the owner access again: a run must not hide what it wrote by closing a directory."""
    handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
    try:
        restore_rights(f"/proc/self/fd/{handle}")
    finally:
        os.close(handle)
