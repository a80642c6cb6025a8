"""Refuses shell scripts that plainly destroy. A seat belt, not the wall: the sandbox is the wall.

It protects people and agents from their own slips and tells them early. It does not stop anyone who
wants to get round it (variables, files, other languages), and nothing relies on it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nox_api import shell
from nox_api.shell import Function, Node, Simple, Subshell, Variable, Word

MAX_EXAMINED = 16 << 10
"""Characters of a script that are read; the time that takes is the event loop's."""

_SHELLS = frozenset(("sh", "bash", "dash", "zsh", "ksh", "ash"))
_MAX_VALUE = 4096
"""Characters of a word; variables that double each other would grow without bound."""
_MAX_NESTED = 2
"""Scripts within scripts: `bash -c "…"` in what `eval` gets."""

_TOP = (
    "bin boot dev etc home lib lib32 lib64 libx32 media mnt opt proc root run sbin srv sys usr var"
)
_PROTECTED = frozenset(
    (
        "/",
        *(f"/{name}" for name in _TOP.split()),
        *(f"/usr/{name}" for name in ["bin", "include", "lib", "lib64", "local", "sbin", "share"]),
        *(f"/var/{name}" for name in ["cache", "lib", "log", "spool"]),
    )
)
_HARMLESS_DEVICE = re.compile(
    r"/dev/(null|zero|full|tty|std(in|out|err)|u?random|fd(/.*)?|shm(/.*)?|pts(/.*)?)"
)
_FORMAT = re.compile(r"mkfs(\..+)?|mke2fs|mkswap|wipefs|blkdiscard|s?fdisk|sgdisk|parted")
_POWER = frozenset(("shutdown", "reboot", "poweroff", "halt"))
_POWER_VERBS = frozenset(("poweroff", "reboot", "halt", "kexec", "rescue", "emergency", "suspend"))
_TRIGGERS = ("/proc/sysrq-trigger", "/proc/sys/kernel/")

# Commands that run the one after them, and their options that take a value of their own.
_PREFIXES: dict[str, frozenset[str]] = {
    "sudo": frozenset(["-u", "-g", "-h", "-p", "-C", "-r", "-t", "-U", "-D", "-R", "-T"]),
    "doas": frozenset(("-u", "-C")),
    "env": frozenset(("-u", "-C", "--unset", "--chdir")),
    "nice": frozenset(("-n", "--adjustment")),
    "ionice": frozenset(("-c", "-n", "-p")),
    "timeout": frozenset(("-s", "-k", "--signal", "--kill-after")),
    "stdbuf": frozenset(("-i", "-o", "-e")),
    "xargs": frozenset(["-I", "-n", "-P", "-L", "-d", "-a", "-s", "-E"]),
    "exec": frozenset(("-a",)),
    **dict.fromkeys(("nohup", "setsid", "command", "builtin", "busybox", "time"), frozenset()),
}
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=")


@dataclass(frozen=True)
class Refusal:
    """`rule` is a short stable name, `detail` says what is refused."""

    rule: str
    detail: str


class _RefusedError(Exception):
    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(detail)
        self.refusal = Refusal(rule, detail)


def examine(
    script: str, args: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> Refusal | None:
    """The rule that `script` breaks when run with `args` and `env`, or None."""
    values = dict(env or {})
    values.update((str(number), value) for number, value in enumerate(args, start=1))
    try:
        _Shell(values).run(shell.parse(script[:MAX_EXAMINED]))
    except _RefusedError as refused:
        return refused.refusal
    return None


@dataclass(frozen=True)
class _Argument:
    """What is known of a word. `text` is None if only the shell knows it."""

    text: str | None
    has_glob: bool = False


@dataclass
class _Shell:
    """What is known while the commands pass by, in their order."""

    values: dict[str, str]
    directory: str | None = None
    """None: the sandbox, or not known."""
    nested: int = 0
    _defined: set[str] = field(default_factory=set)

    def run(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            if isinstance(node, Simple):
                self._simple(node)
            elif isinstance(node, Subshell):
                _Shell(dict(self.values), self.directory, self.nested).run(node.nodes)
            else:
                self._function(node)

    def _function(self, function: Function) -> None:
        own = [call for call in shell.calls(function.nodes) if _name(call) == function.name]
        if len(own) > 1 and any(call.concurrent for call in own):
            raise _RefusedError(
                "fork-bomb", f"defines {function.name}(), which starts itself twice, without end"
            )
        _Shell(dict(self.values), self.directory, self.nested).run(function.nodes)

    def _simple(self, command: Simple) -> None:
        for target in command.targets:
            self._writes(self._value(target).text)
        words = _without_prefixes(self._after_assignments(command.words))
        if not words or words[0].text is None:
            return
        name, arguments = posixpath.basename(words[0].text), words[1:]
        if name in _SHELLS or name == "eval":
            self._script(name, arguments, command.here)
        elif name == "cd" and arguments:
            self.directory = self._path(arguments[-1])
        else:
            self._judge(name, arguments)

    def _after_assignments(self, words: list[Word]) -> list[_Argument]:
        """The words of the command itself; what is assigned without one is remembered."""
        rest = list(words)
        assigned: dict[str, str | None] = {}
        while rest and rest[0].parts and isinstance(first := rest[0].parts[0], str):
            match = _ASSIGNMENT.match(first)
            if not match:
                break
            text = self._value(rest.pop(0)).text
            assigned[match[1]] = None if text is None else text[match.end() :]
        for name, value in assigned.items() if not rest else ():
            self.values.pop(name, None)
            if value is not None:
                self.values[name] = value
        return [self._value(word) for word in rest]

    def _value(self, word: Word) -> _Argument:
        text = ""
        for part in word.parts:
            piece = self.values.get(part.name) if isinstance(part, Variable) else part
            if piece is None:
                return _Argument(None)
            text += piece
            if len(text) > _MAX_VALUE:
                return _Argument(None)
        return _Argument(text, word.has_glob)

    def _script(self, name: str, arguments: list[_Argument], here: list[str]) -> None:
        if self.nested >= _MAX_NESTED:
            return
        texts = [argument.text for argument in arguments]
        scripts = list(here)
        if name == "eval":
            scripts.append(" ".join(text for text in texts if text is not None))
        else:
            flags = [i for i, text in enumerate(texts) if re.fullmatch(r"-[a-z]*c", text or "")]
            if flags and flags[0] + 1 < len(texts):
                scripts.append(texts[flags[0] + 1] or "")
        for script in scripts:
            inner = _Shell(dict(self.values), self.directory, self.nested + 1)
            inner.run(shell.parse(script))

    def _judge(self, name: str, arguments: list[_Argument]) -> None:
        texts = [argument.text or "" for argument in arguments]
        options = [text for text in texts if text.startswith("-")]
        operands = [argument for argument in arguments if not (argument.text or "").startswith("-")]
        if name == "rm":
            if "--no-preserve-root" in options or _has(options, "rR", "--recursive"):
                self._spares("remove-system", operands, "removes")
        elif name in ("chmod", "chown", "chgrp", "chattr"):
            if _has(options, "R", "--recursive"):
                self._spares("permissions-system", operands, "changes all of")
        elif name == "mv":
            self._spares("remove-system", operands[:-1], "moves away")
        elif name == "find":
            if "-delete" in options or ("rm" in texts and {"-exec", "-execdir"} & set(options)):
                starts = [a for a in arguments if (a.text or "").startswith("/")]
                self._spares("remove-system", starts[:1], "removes what is in")
        elif name in ("dd", "tee", "shred", "cp", "truncate"):
            for text in texts if name != "cp" else texts[-1:]:
                self._writes(text.removeprefix("of="))
        elif _FORMAT.fullmatch(name):
            for text in texts:
                if text.startswith("/dev/") and "-l" not in options:
                    raise _RefusedError("format-device", f"writes a new layout to {text}")
        else:
            _power(name, texts)

    def _spares(self, rule: str, operands: Sequence[_Argument], verb: str) -> None:
        for operand in operands:
            path = self._path(operand)
            if path is None:
                continue
            parent, last = posixpath.split(path)
            if path in _PROTECTED:
                raise _RefusedError(rule, f"{verb} {path}")
            if operand.has_glob and parent in _PROTECTED and re.search(r"[*?\[]", last):
                raise _RefusedError(rule, f"{verb} {path}")

    def _writes(self, text: str | None) -> None:
        path = self._path(_Argument(text))
        if path is None:
            return
        if path.startswith(_TRIGGERS):
            raise _RefusedError("kernel", f"writes to {path}")
        if path.startswith("/dev/") and not _HARMLESS_DEVICE.fullmatch(path):
            raise _RefusedError("write-device", f"writes to the device {path}")

    def _path(self, argument: _Argument) -> str | None:
        """The absolute path meant, where that is known."""
        if argument.text is None or (self.directory is None and not argument.text.startswith("/")):
            return None
        joined = posixpath.join(self.directory or "/", argument.text)
        return "/" + posixpath.normpath(joined).lstrip("/")


def _name(command: Simple) -> str | None:
    return command.words[0].literal if command.words else None


def _without_prefixes(words: list[_Argument]) -> list[_Argument]:
    while words and (name := posixpath.basename(words[0].text or "")) in _PREFIXES:
        valued, words = _PREFIXES[name], words[1:]
        while words and (text := words[0].text or "").startswith("-") and text != "-":
            if name == "env" and text in ("-S", "--split-string"):
                break
            words = words[2 if text in valued else 1 :]
        while name in ("env", "sudo") and words and _ASSIGNMENT.match(words[0].text or ""):
            words = words[1:]
        if name == "timeout":
            words = words[1:]
    return words


def _has(options: list[str], letters: str, long: str) -> bool:
    """Whether one of the short options `letters` is given, or the `long` one, abbreviated too."""
    for option in options:
        if option.startswith("--"):
            if len(option) > 4 and long.startswith(option):
                return True
        elif any(letter in option for letter in letters):
            return True
    return False


def _power(name: str, texts: list[str]) -> None:
    first = next((text for text in texts if not text.startswith("-")), "")
    if (
        name in _POWER
        or (name in ("init", "telinit") and first in ("0", "1", "6"))
        or (name == "systemctl" and first in _POWER_VERBS)
    ):
        raise _RefusedError("power", f"stops the machine by {name}")
