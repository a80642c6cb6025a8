"""Which relative paths name a file in the sandbox. Pure; nothing here touches a file system."""

from __future__ import annotations

import unicodedata

MAX_PATH = 1024
"""Bytes of the whole path, in UTF-8."""
MAX_COMPONENT = 255
"""Bytes of one component: NAME_MAX of every file system in use."""
TEMPORARY_PREFIX = ".nox-put-"
"""Names of uploads under way; nobody may address them."""


class PathError(ValueError):
    """The path is refused; the message says which rule it breaks."""


def shown(name: str) -> str:
    """A name of a file as clients are told it: what is not UTF-8 becomes replacement characters."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def components(path: str) -> tuple[str, ...]:
    """Split `path` into its components; PathError unless each rule holds."""
    try:
        size = len(path.encode("utf-8"))
    except UnicodeEncodeError:
        raise PathError("the path is not valid Unicode") from None
    if not path:
        raise PathError("the path is empty")
    if size > MAX_PATH:
        raise PathError(f"the path is longer than {MAX_PATH} bytes")
    if path.startswith("/"):
        raise PathError("the path is absolute")
    if any(unicodedata.category(character) == "Cc" for character in path):
        raise PathError("the path holds a control character")
    parts = tuple(path.split("/"))
    for part in parts:
        if part in ("", ".", ".."):
            raise PathError("the path has an empty, '.' or '..' component")
        if len(part.encode("utf-8")) > MAX_COMPONENT:
            raise PathError(f"a component is longer than {MAX_COMPONENT} bytes")
        if part.startswith(TEMPORARY_PREFIX):
            raise PathError(f"names that start with {TEMPORARY_PREFIX!r} are reserved")
    return parts
