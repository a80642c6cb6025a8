# SPDX-License-Identifier: Apache-2.0
"""A release's archive on a host: brought piece by piece, once. What nox_archive does there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .digests import digest_of_file


def take_back(path: Path, mode: int, check_mode: bool) -> bool:
    """Root's, and for root alone to change; whether that had to be set."""
    found = path.stat()
    right = (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (0, 0, mode)
    if not right and not check_mode:
        os.chown(path, 0, 0)
        path.chmod(mode)
    return not right


def own_places(root: Path, archive: Path, check_mode: bool) -> list[Path]:
    """Makes the directories that releases lie in, and sees to it that none but root can change them, or the archive.
    Returns what had to be made or set right."""
    changed = []
    for directory in (root, root / "archives", root / "releases"):
        made = not directory.is_dir()
        if not check_mode:
            directory.mkdir(parents=True, exist_ok=True)
        if (directory.is_dir() and take_back(directory, 0o755, check_mode)) or made:
            changed.append(directory)
    if archive.is_file() and take_back(archive, 0o644, check_mode):
        changed.append(archive)
    return changed


def answer(options: dict[str, Any]) -> dict[str, Any]:
    """What nox_archive returns; `options` are its own, checked, and check_mode. Raises OSError."""
    root, sha256, check_mode = Path(options["root"]), options["sha256"], options["check_mode"]
    archive = root / "archives" / f"{options['id']}.tar.gz"
    partial = archive.with_name(f".{archive.name}.part")
    changed = own_places(root, archive, check_mode)
    if archive.is_file() and digest_of_file(archive) == sha256:
        return {"changed": bool(changed), "complete": True, "have": archive.stat().st_size}
    have = partial.stat().st_size if partial.exists() else 0
    if options["piece"]:
        # a piece that was written halfway when the host lost power begins anew
        with open(partial, "r+b" if have else "wb") as handle:  # noqa: PTH123  a mode, not a way
            handle.truncate(options["offset"])
            handle.seek(options["offset"])
            handle.write(Path(options["piece"]).read_bytes())
            handle.flush()
            os.fsync(handle.fileno())
        have = partial.stat().st_size
    complete = bool(have) and digest_of_file(partial) == sha256
    if complete and not check_mode:
        partial.chmod(0o644)
        partial.replace(archive)
        for other in archive.parent.glob(".*.part"):  # of releases that were given up
            other.unlink()
    return {"changed": True, "complete": complete, "have": have}
