"""Adoption of a dead sandbox's init, so that its end can be awaited and its usage read."""

from __future__ import annotations

import ctypes
import os
import resource
from contextlib import suppress

_PR_SET_CHILD_SUBREAPER = 36


def adopt() -> None:
    """Become the parent of every descendant whose own parent dies. OSError if refused.

    bubblewrap exits as soon as the program has, without waiting for the init of the namespace,
    which then is killed. Only who waits for that init knows that nothing survived, since the
    kernel ends it last, and learns what the processes it had waited for have used.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def bury(init: int) -> resource.struct_rusage | None:
    """Wait until the killed process `init` and its whole namespace are gone; what they used.

    None if it never became ours.
    """
    try:
        _, _, usage = os.wait4(init, 0)
    except ChildProcessError:
        return None
    return usage


def children() -> list[int]:
    """The pids of all children, of every thread; none where /proc does not tell."""
    found: list[int] = []
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError), open(f"/proc/self/task/{thread}/children") as file:
            found += map(int, file.read().split())
    return found
