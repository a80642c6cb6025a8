# SPDX-License-Identifier: Apache-2.0
"""Files of the host's own configuration that Nox writes or changes, with the way back. Uninstall goes it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path
from typing import Any

from . import brought

RECORD = "host_files"
OURS = "managed by Ansible, role nox_"


def recorded() -> dict[str, dict[str, Any]]:
    """Path → what was there before: `was` (its text, None for nothing), or for one line of a file `line`, `line_was`."""
    return {path: entry for path, entry in brought.read().get(RECORD, {}).items() if isinstance(entry, dict)}


def read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None


def mounts() -> dict[str, set[str]]:
    """Mount point → its options; of several mounts on one the last, which is the one that counts."""
    lines = [line.split(" ") for line in (read("/proc/self/mountinfo") or "").splitlines()]
    return {words[4]: set(words[5].split(",")) for words in lines if len(words) > 5}


def free_mib(path: str) -> int:
    """Free space for root in MiB on the file system that holds (or would hold) the path."""
    probe = Path(path)
    while not probe.exists():
        probe = probe.parent
    found = os.statvfs(probe)
    return found.f_bavail * found.f_frsize // 1048576


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def write(path: str, text: str, mode: int) -> None:
    """Through a temporary file and a rename, as root's; its name is one that no program reads as configuration."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.nox-new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape") as handle:
        handle.write(text)
        os.fchmod(descriptor, mode)
    temporary.replace(target)


def make_parents(path: str) -> list[str]:
    """The directories that had to be made, the innermost first."""
    missing = [parent for parent in Path(path).parents if not parent.exists()]
    for parent in reversed(missing):
        parent.mkdir(mode=0o755)
    return [str(parent) for parent in missing]


def in_place(path: str, text: str, mode: int) -> bool:
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return (
        read(path) == text
        and not os.path.islink(path)  # noqa: PTH114
        and (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (0, 0, mode)
    )


def put(path: str, text: str, mode: int) -> None:
    """Writes a whole file; what was there before ours is remembered, once."""
    known = recorded()
    if path not in known:
        was = read(path)
        if was is not None and OURS in was:  # the record is lost: nobody else's was there
            was = None
        known[path] = {"was": was, "made": []}
        if was is not None:
            known[path]["mode"] = os.lstat(path).st_mode & 0o7777
    known[path]["made"] = [*known[path]["made"], *make_parents(path)]
    known[path]["wrote"] = digest(text)
    brought.replace(RECORD, known)
    write(path, text, mode)


def with_line(text: str, pattern: str, line: str) -> tuple[str, str | None]:
    """(the text with its last matching line replaced, or the line added; what that line was)."""
    lines = text.splitlines(keepends=True)
    for number in range(len(lines) - 1, -1, -1):
        if re.match(pattern, lines[number]):
            was = lines[number].rstrip("\n")
            lines[number] = f"{line}\n"
            return "".join(lines), was
    return f"{text.rstrip()}\n{line}\n" if text.strip() else f"{line}\n", None


def put_line(path: str, pattern: str, line: str) -> None:
    """Changes one line of somebody's file; the line that was there is remembered, once."""
    known = recorded()
    text = read(path) or ""
    changed, was = with_line(text, pattern, line)
    entry = known.setdefault(path, {"pattern": pattern, "line_was": was})
    entry["line"] = line
    brought.replace(RECORD, known)
    write(path, changed, os.lstat(path).st_mode & 0o7777 if os.path.lexists(path) else 0o644)


def take_back(path: str, keep_record: bool = False) -> str:
    """Makes a file what it was before; why it stays as it is, "" if it doesn't."""
    known = recorded()
    entry = known.pop(path, None)
    if entry is None:
        return ""
    text, stays = read(path), ""
    if "line" in entry:
        if text is not None and entry["line"] in text.splitlines():
            lines = text.splitlines()
            place = lines.index(entry["line"])
            lines[place : place + 1] = [entry["line_was"]] if entry["line_was"] is not None else []
            write(path, "\n".join(lines) + "\n", os.lstat(path).st_mode & 0o7777)
    elif text is not None and entry["was"] is None:
        Path(path).unlink()
    elif text is not None:
        if digest(text) == entry["wrote"]:
            write(path, entry["was"], entry["mode"])
        else:
            stays = f"{path}: changed since Nox wrote it"
    for directory in entry.get("made", []):
        with contextlib.suppress(OSError):  # somebody else's files are in it
            Path(directory).rmdir()
    brought.replace(RECORD, known)
    return stays
