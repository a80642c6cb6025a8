# SPDX-License-Identifier: Apache-2.0
"""An unpacked release against the list it brings along."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .digests import digest_of_file


def differing(directory: Path) -> Iterator[str]:
    """Every file and link of an unpacked release that isn't as its own list says. Raises OSError, ValueError or
    KeyError when there is no such list."""
    files = json.loads((directory / "RELEASE.json").read_text(encoding="utf-8"))["files"]
    for name, wanted in files.items():
        path = directory / name
        try:
            if wanted.startswith("-> "):
                good = path.is_symlink() and f"-> {os.readlink(path)}" == wanted
            else:
                good = digest_of_file(path) == wanted
        except OSError:
            good = False
        if not good:
            yield name


def release_problem(directory: Path) -> str:
    """What is wrong with an unpacked release, "" if nothing."""
    try:
        name = next(differing(directory), "")
    except (OSError, ValueError, KeyError):
        return "RELEASE.json is missing or unreadable"
    return f"{name} is missing or changed" if name else ""


def changed_files(directory: Path) -> list[Path]:
    """The files of a release that are there with another content: somebody's work."""
    try:
        return [directory / name for name in differing(directory) if (directory / name).is_file()]
    except (OSError, ValueError, KeyError):
        return []


def whole_manifest(entries: Any) -> list[dict[str, Any]]:
    """The entries if all of them are activations, none if any is something else."""
    whole = isinstance(entries, list) and all(isinstance(entry, dict) and "release" in entry for entry in entries)
    return entries if whole else []


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """The record of activations, oldest first; empty where it is missing or damaged."""
    try:
        return whole_manifest(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return []


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
