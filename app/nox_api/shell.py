"""Reads POSIX shell far enough to tell which commands a script plainly runs.

Words, quotes, operators, redirections, here-documents, groups, functions and substitutions are
understood; what only a running shell can know (the value of most expansions) is left unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeAlias

_MAX_DEPTH = 24
_PLAIN = re.compile(r"[^\s'\"\\$`|&;<>()#*?\[]+")
_BLANKS = re.compile(r"(?:[ \t\r]|\\\n)*(?:#[^\n]*)?")
_QUOTED = re.compile(r"[^\"\\$`}]+")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[0-9@*#?!$-]")
_BRACED = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*|[0-9])\}")
_OPERATOR = re.compile(r"\|\||&&|;;|\|&|<<-|<<<|<<|>>|<&|>&|<>|>\||&>>|&>|[|&;<>()\n]")
_REDIRECTIONS = frozenset(("<", ">", ">>", "<&", ">&", "<>", ">|", "&>", "&>>", "<<<"))
_HERE = frozenset(("<<", "<<-"))
# Words that begin or join commands without being one themselves.
_RESERVED = frozenset(
    ("!", "if", "then", "elif", "else", "fi", "while", "until", "do", "done", "time")
)
_CLOSING = frozenset((")", "}", ";;", "esac"))


class _SyntaxError(Exception):
    """The script cannot be read on from here; the shell will say so itself."""


@dataclass(frozen=True)
class Variable:
    """The value of a variable or a positional parameter."""

    name: str


@dataclass
class Word:
    """One word. A part is text, a variable, or None for what only the shell can know."""

    parts: list[str | Variable | None] = field(default_factory=list)
    quoted: bool = False
    has_glob: bool = False
    """Whether an unquoted pattern character is in it."""

    @property
    def literal(self) -> str | None:
        """Its text, if it has no expansion."""
        return (
            "".join(map(str, self.parts)) if all(isinstance(p, str) for p in self.parts) else None
        )


@dataclass
class Simple:
    """One command with its arguments. `targets` are the files it writes to by redirection."""

    words: list[Word] = field(default_factory=list)
    targets: list[Word] = field(default_factory=list)
    here: list[str] = field(default_factory=list)
    """The texts of its here-documents."""
    concurrent: bool = False
    """Whether it runs beside others: in a pipeline, or in the background."""


@dataclass
class Subshell:
    """Commands whose change of directory and variables ends with them."""

    nodes: list[Node]


@dataclass
class Function:
    """A definition."""

    name: str
    nodes: list[Node]


Node: TypeAlias = "Simple | Subshell | Function"


def parse(script: str) -> list[Node]:
    """The commands of `script`, in order, up to the first place that cannot be understood."""
    return _Parser(script).script()


def calls(nodes: list[Node]) -> Iterator[Simple]:
    """All commands in `nodes`, those of groups and functions too."""
    for node in nodes:
        if isinstance(node, Simple):
            yield node
        else:
            yield from calls(node.nodes)


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        self._pending: list[tuple[Simple, str, bool, bool]] = []
        """Here-documents whose text follows the line: command, end, literal, tabs stripped."""

    def script(self) -> list[Node]:
        nodes: list[Node] = []
        with suppress(_SyntaxError):
            self._list(nodes, ())
        return nodes

    def _list(self, nodes: list[Node], ends: tuple[str, ...]) -> str:
        """Read commands into `nodes` until one of `ends`, which is returned, or the text's end."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _SyntaxError
        while True:
            start, piped = len(nodes), False
            while (stop := self._command(nodes)) in ("|", "|&"):
                piped = True
            if piped or stop == "&":
                for node in calls(nodes[start:]):
                    node.concurrent = True
            if stop in ends or not stop:
                self._depth -= 1
                return stop
            if stop in _CLOSING:
                raise _SyntaxError

    def _command(self, nodes: list[Node]) -> str:
        """Read one command into `nodes`; gives what ended it, "" at the text's end."""
        current = Simple()
        # Before its parts: what a substitution runs is found however the reading ends.
        nodes.append(current)
        while True:
            self._blanks()
            operator = _OPERATOR.match(self._text, self._at)
            if operator is None:
                if self._at >= len(self._text):
                    return ""
                word = self._word(nodes)
                if self._is_descriptor(word):
                    continue
                if current.words or word.quoted or not (stop := self._keyword(word, nodes)):
                    current.words.append(word)
                elif stop in _CLOSING:
                    return stop
                continue
            token = operator[0]
            self._at = operator.end()
            if token in _HERE:
                self._here(current, token, nodes)
            elif token in _REDIRECTIONS:
                self._redirection(current, token, nodes)
            elif token == "(":
                self._parenthesis(current, nodes)
            else:
                if token == "\n":
                    self._here_texts(nodes)
                return token

    def _is_descriptor(self, word: Word) -> bool:
        """Whether it is the number of a redirection that follows at once."""
        text = word.literal or ""
        return text.isdigit() and not word.quoted and self._text.startswith(("<", ">"), self._at)

    def _keyword(self, word: Word, nodes: list[Node]) -> str:
        """Deal with a reserved word in a command's place; gives it, "" if it is none."""
        text = word.literal or ""
        if text == "{":
            self._list(nodes, ("}",))
        elif text == "case":
            self._case(nodes)
        elif text == "function":  # of bash
            self._blanks()
            name = self._word(nodes).literal or ""
            self._blanks()
            if self._text.startswith("(", self._at):
                self._at += 1
                self._closed()
            self._function(nodes, name)
        elif text not in _RESERVED and text not in _CLOSING:
            return ""
        return text

    def _case(self, nodes: list[Node]) -> None:
        self._blanks()
        self._word(nodes)
        while True:
            # ` in`, or what ended the branch before, then the patterns up to their parenthesis
            while True:
                self._space()
                if self._at >= len(self._text):
                    raise _SyntaxError
                if self._text[self._at] in "(|":
                    self._at += 1
                elif self._text[self._at] == ")":
                    self._at += 1
                    break
                elif self._text[self._at] in ";&<>":
                    raise _SyntaxError
                elif self._word(nodes).literal == "esac":
                    return
            if self._list(nodes, (";;", "esac")) != ";;":
                return

    def _parenthesis(self, current: Simple, nodes: list[Node]) -> None:
        if not current.words:
            inner: list[Node] = []
            nodes.append(Subshell(inner))
            self._list(inner, (")",))
            return
        name = current.words.pop().literal
        if current.words or name is None:
            raise _SyntaxError
        self._closed()
        self._function(nodes, name)

    def _closed(self) -> None:
        self._blanks()
        if not self._text.startswith(")", self._at):
            raise _SyntaxError
        self._at += 1

    def _function(self, nodes: list[Node], name: str) -> None:
        self._space()
        opening = self._text[self._at : self._at + 1]
        if opening not in ("{", "("):
            raise _SyntaxError
        self._at += 1
        inner: list[Node] = []
        nodes.append(Function(name, inner))
        self._list(inner, ("}" if opening == "{" else ")",))

    def _redirection(self, current: Simple, operator: str, nodes: list[Node]) -> None:
        self._blanks()
        target = self._word(nodes)
        if operator == "<<<":
            current.here.append(target.literal or "")
        elif ">" in operator:
            current.targets.append(target)

    def _here(self, current: Simple, operator: str, nodes: list[Node]) -> None:
        self._blanks()
        end = self._word(nodes)
        if end.literal is None:
            raise _SyntaxError
        self._pending.append((current, end.literal, end.quoted, operator == "<<-"))

    def _here_texts(self, nodes: list[Node]) -> None:
        for command, end, is_literal, strips in self._pending:
            lines = []
            while self._at < len(self._text):
                found = self._text.find("\n", self._at)
                line = self._text[self._at : found if found >= 0 else len(self._text)]
                self._at += len(line) + 1
                line = line.lstrip("\t") if strips else line
                if line == end:
                    break
                lines.append(line)
            text = "\n".join(lines)
            command.here.append(text)
            if not is_literal:
                inside = _Parser(text)
                with suppress(_SyntaxError):
                    inside._double_quoted(Word(), nodes, "")
        self._pending.clear()

    def _blanks(self) -> None:
        """Skip blanks, continued lines and comments, all but the newline."""
        self._at = _BLANKS.match(self._text, self._at).end()  # type: ignore[union-attr]

    def _space(self) -> None:
        """Skip newlines, too."""
        self._blanks()
        while self._text.startswith("\n", self._at):
            self._at += 1
            self._blanks()

    def _word(self, nodes: list[Node]) -> Word:
        word, start = Word(), self._at
        while self._at < len(self._text):
            if plain := _PLAIN.match(self._text, self._at):
                word.parts.append(plain[0])
                self._at = plain.end()
                continue
            character = self._text[self._at]
            if character in " \t\r\n|&;<>()":
                break
            self._at += 1
            if character == "\\":
                word.quoted = True
                if (escaped := self._take()) != "\n":
                    word.parts.append(escaped)
            elif character == "'":
                word.quoted = True
                word.parts.append(self._until("'"))
            elif character == '"':
                word.quoted = True
                self._double_quoted(word, nodes, '"')
            elif character == "$":
                self._dollar(word, nodes)
            elif character == "`":
                self._backticks(word, nodes)
            else:
                word.has_glob = word.has_glob or character in "*?["
                word.parts.append(character)
        if self._at == start:
            raise _SyntaxError
        return word

    def _double_quoted(self, word: Word, nodes: list[Node], end: str) -> None:
        """Up to `end`, or the end of the text where that is empty."""
        while self._at < len(self._text):
            if run := _QUOTED.match(self._text, self._at):
                word.parts.append(run[0])
                self._at = run.end()
                continue
            character = self._take()
            if character == "\\":
                escaped = self._take()
                if escaped != "\n":
                    word.parts.append(escaped if escaped in '"\\$`' else "\\" + escaped)
            elif character == "$":
                self._dollar(word, nodes)
            elif character == "`":
                self._backticks(word, nodes)
            elif character == end:
                return
            else:
                word.parts.append(character)
        if end:
            raise _SyntaxError

    def _dollar(self, word: Word, nodes: list[Node]) -> None:
        if self._text.startswith("((", self._at):
            self._arithmetic()
            word.parts.append(None)
        elif self._text.startswith("(", self._at):
            self._at += 1
            inner: list[Node] = []
            nodes.append(Subshell(inner))
            self._list(inner, (")",))
            word.parts.append(None)
        elif braced := _BRACED.match(self._text, self._at):
            self._at = braced.end()
            word.parts.append(Variable(braced[1]))
        elif self._text.startswith("{", self._at):
            self._at += 1
            self._double_quoted(Word(), nodes, "}")
            word.parts.append(None)
        elif name := _NAME.match(self._text, self._at):
            self._at = name.end()
            word.parts.append(Variable(name[0]))
        else:
            word.parts.append("$")

    def _arithmetic(self) -> None:
        depth = 0
        while True:
            character = self._take()
            depth += (character == "(") - (character == ")")
            if depth == 0:
                return

    def _backticks(self, word: Word, nodes: list[Node]) -> None:
        text = ""
        while (character := self._take()) != "`":
            if character == "\\":
                escaped = self._take()
                character = escaped if escaped in "`\\$" else "\\" + escaped
            text += character
        inside = _Parser(text)
        inside._depth = self._depth
        nodes.append(Subshell(inside.script()))
        word.parts.append(None)

    def _until(self, end: str) -> str:
        found = self._text.find(end, self._at)
        if found < 0:
            raise _SyntaxError
        text, self._at = self._text[self._at : found], found + 1
        return text

    def _take(self) -> str:
        if self._at >= len(self._text):
            raise _SyntaxError
        self._at += 1
        return self._text[self._at - 1]
