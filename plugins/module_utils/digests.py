# SPDX-License-Identifier: Apache-2.0
"""SHA-256, as 64 hexadecimal digits."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest_of_file(path: Path) -> str:
    """Of a file of any size, in pieces of 1 MiB. Raises OSError."""
    found = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(1 << 20):
            found.update(piece)
    return found.hexdigest()
