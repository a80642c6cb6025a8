"""The settings file: `/etc/default` syntax, read and checked the same way by both services."""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

_KEY = re.compile(r"(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_SIZE = re.compile(r"([0-9]{1,15})([KMG]?)", re.IGNORECASE)
_FACTOR = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_LEVELS = ("debug", "info", "warning", "error")

# A sandbox in one of these would hand system files to every run.
_SYSTEM_TREES = ("/bin", "/boot", "/dev", "/etc", "/lib", "/proc", "/run", "/sbin", "/sys", "/usr")
_SHARED_DIRECTORIES = ("/", "/home", "/mnt", "/opt", "/root", "/srv", "/tmp", "/var", "/var/tmp")

BACKENDS = ("auto", "zygote", "bubblewrap")
PREIMPORT = (
    *("collections", "dataclasses", "datetime", "functools", "itertools", "json", "math"),
    *("random", "re", "subprocess", "time", "typing"),
)


class SettingsError(Exception):
    """The file cannot be used; the message names file, line, key and cause, never a secret."""


@dataclass(frozen=True)
class Assignment:
    """One `KEY=value` line; `line` counts from 1."""

    key: str
    value: str
    line: int


@dataclass(frozen=True)
class Settings:
    """What both services need to know. Sizes are bytes, times are seconds."""

    bind_addr: str = "127.0.0.1"
    port: int = 8080
    sandbox: str = "/home/nox/nox/sandbox"
    timeout: float = 20.0
    slots: int = field(default_factory=lambda: os.cpu_count() or 1)
    queue: int = 32
    max_body: int = 16 << 20
    output_limit: int = 1 << 20
    memory: int = 512 << 20
    pids: int = 128
    cpus: float = 0.0
    file_size: int = 64 << 20
    tmp_size: int = 64 << 20
    quota_bytes: int = 1 << 30
    quota_files: int = 20_000
    keep_days: int = 0
    shell_policy: bool = True
    history: bool = False
    history_days: int = 90
    history_size: int = 512 << 20
    network: bool = False
    log_level: str = "info"
    backend: str = "auto"
    preimport: tuple[str, ...] = PREIMPORT


SettingsType = TypeVar("SettingsType", bound=Settings)
Convert = Callable[[str], object]


def _whole(minimum: int, maximum: int) -> Convert:
    def convert(text: str) -> int:
        if not (text.isascii() and text.isdigit()) or not minimum <= int(text[:20]) <= maximum:
            raise ValueError(f"must be a whole number from {minimum} to {maximum}")
        return int(text)

    return convert


def _size(minimum: int, maximum: int) -> Convert:
    def convert(text: str) -> int:
        match = _SIZE.fullmatch(text)
        if not match:
            raise ValueError("must be a number of bytes, or a number with K, M or G")
        size = int(match[1]) * _FACTOR[match[2].upper()]
        if not minimum <= size <= maximum:
            raise ValueError(f"must be from {minimum} to {maximum} bytes")
        return size

    return convert


def _seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", text) or not 0.1 <= float(text) <= 3600:
        raise ValueError("must be a number of seconds from 0.1 to 3600")
    return float(text)


def _cores(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,4}(\.[0-9]{1,2})?", text) or 0 < float(text) < 0.05:
        raise ValueError("must be a number of cores from 0.05, such as 1.5, or 0 for all")
    return float(text)


def _slots(text: str) -> object:
    return _whole(0, 1024)(text) or os.cpu_count() or 1


def _address(text: str) -> str:
    if text == "localhost":
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise ValueError("must be an IP address, such as 127.0.0.1") from None


def _directory(text: str) -> str:
    if not text.startswith("/") or os.path.normpath(text) != text or not text.isprintable():
        raise ValueError("must be an absolute path without '.', '..' or doubled slashes")
    if text in _SHARED_DIRECTORIES or any(
        text == tree or text.startswith(tree + "/") for tree in _SYSTEM_TREES
    ):
        raise ValueError("must be a directory of its own, outside the system's")
    return text


def _switch(text: str) -> bool:
    if text.lower() not in ("on", "off"):
        raise ValueError("must be on or off")
    return text.lower() == "on"


def _level(text: str) -> str:
    if text.lower() not in _LEVELS:
        raise ValueError("must be one of " + ", ".join(_LEVELS))
    return text.lower()


def _backend(text: str) -> str:
    if text.lower() not in BACKENDS:
        raise ValueError("must be one of " + ", ".join(BACKENDS))
    return text.lower()


def _modules(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError("must be names of Python modules, separated by commas")
    return names


_CONVERT: dict[str, tuple[str, Convert]] = {
    "NOX_BIND_ADDR": ("bind_addr", _address),
    "NOX_PORT": ("port", _whole(1, 65535)),
    "NOX_SANDBOX": ("sandbox", _directory),
    "NOX_TIMEOUT": ("timeout", _seconds),
    "NOX_SLOTS": ("slots", _slots),
    "NOX_QUEUE": ("queue", _whole(0, 100_000)),
    "NOX_MAX_BODY": ("max_body", _size(1 << 10, 1 << 30)),
    "NOX_OUTPUT_LIMIT": ("output_limit", _size(1 << 10, 256 << 20)),
    # Below this the interpreter itself does not start.
    "NOX_MEMORY": ("memory", _size(32 << 20, 1 << 40)),
    # bubblewrap's init, the program, and something for it to start.
    "NOX_PIDS": ("pids", _whole(4, 1 << 20)),
    "NOX_CPUS": ("cpus", _cores),
    "NOX_FILE_SIZE": ("file_size", _size(4 << 10, 1 << 40)),
    "NOX_TMP_SIZE": ("tmp_size", _size(64 << 10, 1 << 40)),
    "NOX_QUOTA_BYTES": ("quota_bytes", _size(1 << 20, 1 << 50)),
    "NOX_QUOTA_FILES": ("quota_files", _whole(100, 100_000_000)),
    "NOX_KEEP_DAYS": ("keep_days", _whole(0, 36_500)),
    "NOX_SHELL_POLICY": ("shell_policy", _switch),
    "NOX_HISTORY": ("history", _switch),
    "NOX_HISTORY_DAYS": ("history_days", _whole(0, 36_500)),
    "NOX_HISTORY_SIZE": ("history_size", _size(1 << 20, 1 << 40)),
    "NOX_NETWORK": ("network", _switch),
    "NOX_LOG_LEVEL": ("log_level", _level),
    "NOX_BACKEND": ("backend", _backend),
    "NOX_PREIMPORT": ("preimport", _modules),
}
TOKEN_KEY = "NOX_API_TOKEN"
PREVIOUS_KEY = "NOX_API_TOKEN_PREVIOUS"
PREVIOUS_UNTIL_KEY = "NOX_API_TOKEN_PREVIOUS_UNTIL"


def parse(text: str, path: str) -> list[Assignment]:
    """Split the file's text into assignments, in order.

    Comments, blank lines, quotes and a leading `export` are understood as a shell does; nothing is
    expanded. `path` is for messages only. Raises SettingsError at the first line that is neither.
    """
    assignments = []
    for number, raw in enumerate(text.removeprefix("\ufeff").split("\n"), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        match = _KEY.fullmatch(line)
        if not match:
            raise SettingsError(f"{path}:{number}: not a KEY=value line")
        key = match[1]
        try:
            words = shlex.split(match[2], comments=True)
        except ValueError:
            raise SettingsError(f"{path}:{number}: {key}: a quote is not closed") from None
        if len(words) > 1:
            raise SettingsError(f"{path}:{number}: {key}: a value with spaces needs quotes")
        assignments.append(Assignment(key, words[0] if words else "", number))
    return assignments


def read(path: str) -> list[Assignment]:
    """Read and parse the file at `path`; SettingsError when it cannot be read or parsed."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(1 << 20)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: is not UTF-8 text") from None
    return parse(text, path)


def build(kind: type[SettingsType], assignments: list[Assignment], path: str) -> SettingsType:
    """Check the values and build `kind` from them; of a key set twice the last line counts.

    Keys of others (and the token, which only the front's own type knows) are passed over.
    Raises SettingsError at the first bad value.
    """
    values: dict[str, object] = {}
    for assignment in assignments:
        if assignment.key not in _CONVERT:
            continue
        name, convert = _CONVERT[assignment.key]
        try:
            values[name] = convert(assignment.value)
        except ValueError as error:
            raise SettingsError(f"{path}:{assignment.line}: {assignment.key}: {error}") from None
    return kind(**values)  # type: ignore[arg-type]


def warnings(assignments: list[Assignment], path: str) -> list[str]:
    """One message for each `NOX_` key that nobody reads, with the key that was probably meant."""
    known = [*_CONVERT, TOKEN_KEY, PREVIOUS_KEY, PREVIOUS_UNTIL_KEY]
    messages = []
    for assignment in assignments:
        if not assignment.key.startswith("NOX_") or assignment.key in known:
            continue
        close = difflib.get_close_matches(assignment.key, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        messages.append(f"{path}:{assignment.line}: {assignment.key}: unknown setting{hint}")
    return messages
