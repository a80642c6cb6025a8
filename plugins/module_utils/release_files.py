# SPDX-License-Identifier: Apache-2.0
"""An unpacked release against the list it brings along, and the one that was made when it was unpacked."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .digests import digest_of_file

BROUGHT, MADE = "RELEASE.json", "UNPACKED.json"
# pip is no part of the service: it isn't compiled here, and may be by whoever calls it
PIP_CACHE = re.compile(r"site-packages/pip/(.*/)?__pycache__/[^/]+\.pyc$")


class Unlisted(Exception):
    """A release whose lists are missing, unreadable, or not as they were."""


def read_release(directory: Path) -> dict[str, Any]:
    """What a release says of itself. Raises Unlisted."""
    try:
        release: dict[str, Any] = json.loads((directory / BROUGHT).read_bytes())
        if all(isinstance(wanted, str) for wanted in release["files"].values()):
            return {**release, "python": str(release["python"]), "arch": str(release["arch"])}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    raise Unlisted(f"{BROUGHT} is missing or unreadable")


def entries(directory: Path) -> Iterator[tuple[str, os.stat_result]]:
    """The directory as "." and everything below, as (relative name, status): three thousand of them, so no Path is made of any."""
    yield ".", directory.lstat()
    waiting = [""]
    while waiting:
        place = waiting.pop()
        with os.scandir(f"{directory}/{place}") as found:
            for entry in found:
                name = f"{place}/{entry.name}" if place else entry.name
                yield name, entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(name)


def unlike(directory: Path, brought: dict[str, str]) -> Iterator[str]:
    """Every file and link that isn't as the release's own list says."""
    for name, wanted in brought.items():
        path = f"{directory}/{name}"
        try:
            found = f"-> {os.readlink(path)}" if wanted.startswith("-> ") else digest_of_file(path)
        except OSError:
            found = ""
        if found != wanted:
            yield name


def brought_problem(directory: Path) -> str:
    """What of the release's own list isn't there as it says; "" for nothing."""
    try:
        name = next(unlike(directory, read_release(directory)["files"]), "")
    except Unlisted as problem:
        return str(problem)
    return f"{name} is missing or changed" if name else ""


def write_made(directory: Path) -> None:
    """The list of what was compiled when it was unpacked: name → size, and time of last change in nanoseconds; its digests apart,
    for who takes it over (releases.py). Raises Unlisted."""
    brought = read_release(directory)["files"]
    compiled = {
        name: [status.st_size, status.st_mtime_ns]
        for name, status in entries(directory)
        if name.endswith(".pyc") and name not in brought and not PIP_CACHE.search(name)
    }
    digests = {name: digest_of_file(directory / name) for name in compiled}
    made = {BROUGHT: digest_of_file(directory / BROUGHT), "compiled": compiled, "digests": digests}
    (directory / MADE).write_text(json.dumps(made) + "\n", encoding="utf-8")


def read_made(directory: Path) -> dict[str, Any]:
    """The list of what was compiled. Raises Unlisted."""
    try:
        made: dict[str, Any] = json.loads((directory / MADE).read_bytes())
        made["compiled"] = dict(made["compiled"])
        made[BROUGHT] = str(made[BROUGHT])
        made["digests"] = dict(made.get("digests", {}))  # older ones have none
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise Unlisted(f"{MADE} is missing or unreadable") from error
    return made


def differing(directory: Path, there: list[tuple[str, os.stat_result]]) -> Iterator[str]:
    """Every file of the entries that are there which isn't as the two lists say: missing, changed, or in neither. Raises Unlisted.

    What was compiled is compared by size and time: a digest of each would double what the whole check takes.
    """
    brought, made = read_release(directory)["files"], read_made(directory)
    wanted = made["compiled"]
    if made[BROUGHT] != digest_of_file(directory / BROUGHT):
        yield BROUGHT
    yield from unlike(directory, brought)
    for name, status in there:
        if name in brought or stat.S_ISDIR(status.st_mode) or name in (BROUGHT, MADE):
            continue
        if wanted.pop(name, None) != [status.st_size, status.st_mtime_ns] and not PIP_CACHE.search(name):
            yield name
    yield from wanted


def release_problem(directory: Path) -> tuple[str, str]:
    """What is wrong with an unpacked release, and what of it others than root may change; "" for nothing."""
    try:
        there = list(entries(directory))
        name = next(differing(directory, there), "")
    except (Unlisted, OSError) as problem:  # the latter: it is being removed just now
        return str(problem), ""
    return (f"{name} is missing, changed or not of the release", "") if name else ("", foreign_writer(there))


def changed_files(directory: Path) -> list[Path]:
    """The files and links of a release that are there with another content, or come from elsewhere: somebody's work."""
    try:
        different = [directory / name for name in differing(directory, list(entries(directory)))]
    except (Unlisted, OSError):
        return []
    return [path for path in different if path.is_file() or path.is_symlink()]  # a link may lead to a directory


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


def foreign_writer(there: list[tuple[str, os.stat_result]]) -> str:
    """The first of the entries that others than this user (root, on a host) may change; "" if there is none."""
    me = os.geteuid()
    for name, status in there:
        if status.st_uid != me or (status.st_mode & 0o022 and not stat.S_ISLNK(status.st_mode)):
            return name
    return ""
