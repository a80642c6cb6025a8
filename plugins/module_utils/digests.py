# SPDX-License-Identifier: Apache-2.0
"""SHA-256, as 64 hexadecimal digits."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest_of_file(path: Path | str) -> str:
    """Of a file of any size, in pieces. Raises OSError."""
    found = hashlib.sha256()
    with open(path, "rb", buffering=0) as handle:  # noqa: PTH123  thousands of small ones: a Path and a buffer for each cost a fifth
        while piece := handle.read(1 << 16):
            found.update(piece)
    return found.hexdigest()
