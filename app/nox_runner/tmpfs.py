"""A watch over a run's temporary file systems, for what bubblewrap cannot limit there.

No version can limit the number of files, and before 0.7 not even their size. Both are memory, so
a run that takes too much is killed a moment after it has.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

PATHS = ("/tmp", "/dev/shm")
"""Where a run finds a tmpfs of its own to write to."""
MAX_FILES = 65_536
"""In each; the kernel takes about 1 KiB for an empty one."""
INTERVAL = 0.05
"""Seconds between two looks."""


@dataclass
class Watch:
    """Looks into a run's mount namespace, which its owner may, through /proc.

    `blind` tells why that failed, if it did, for health: then these limits do not hold.
    """

    blind: str = ""

    def exceeded(self, init: int, size: int) -> bool:
        """Whether the run of the process `init` has more than `size` bytes, or too many files."""
        root = f"/proc/{init}/root"
        try:
            if os.stat(root).st_dev == os.stat("/").st_dev:
                return False  # bubblewrap has not built the run's own yet
            states = [os.statvfs(root + path) for path in PATHS]
        except (FileNotFoundError, ProcessLookupError):
            return False  # not yet, or no longer
        except OSError as error:
            self.blind = f"the temporary files of a run cannot be seen: {error.strerror}"
            return False
        self.blind = ""
        return any(
            (state.f_blocks - state.f_bfree) * state.f_frsize > size
            or state.f_files - state.f_ffree > MAX_FILES
            for state in states
        )
