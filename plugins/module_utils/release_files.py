# SPDX-License-Identifier: Apache-2.0
"""An unpacked release against the list it brings along."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path


def release_problem(directory: Path) -> str:
    """What is wrong with an unpacked release, "" if nothing: every file and link against its own list."""
    try:
        about = json.loads((directory / "RELEASE.json").read_text(encoding="utf-8"))
        files = about["files"]
    except (OSError, ValueError, KeyError):
        return "RELEASE.json is missing or unreadable"
    for name, wanted in files.items():
        path = directory / name
        try:
            if wanted.startswith("-> "):
                good = path.is_symlink() and f"-> {os.readlink(path)}" == wanted
            else:
                good = hashlib.sha256(path.read_bytes()).hexdigest() == wanted
        except OSError:
            good = False
        if not good:
            return f"{name} is missing or changed"
    return ""


def foreign_writer(directory: Path) -> str:
    """The first file of a release that others than its owner (root, on a host) may change; "" if there is none."""
    me = os.geteuid()
    for place, directories, files in os.walk(directory):
        for name in ["", *directories, *files]:
            path = os.path.join(place, name)  # noqa: PTH118  three thousand of them: a third of pathlib's time
            status = os.lstat(path)
            if status.st_uid != me or (status.st_mode & 0o022 and not os.path.islink(path)):  # noqa: PTH114
                return os.path.relpath(path, directory)
    return ""
