"""What a person sees while a playbook runs: one table that is drawn anew on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from noxctl.play import Event

# Text that comes from hosts may hold anything; a terminal must not obey it.
_CONTROLS = {code: "" for code in [*range(32), 127, *range(128, 160)] if chr(code) not in "\n\t"}

STYLES = {
    "done": "green", "ok": "green", "already": "green", "clean": "green", "healthy": "green", "running": "cyan",
    "failed": "bold red", "unreachable": "bold magenta", "rescued": "bold red", "rolled back": "yellow",
    "drifted": "yellow", "waiting": "dim", "not installed": "yellow",
}  # fmt: skip


def printable(text: str) -> str:
    """`text` without control characters."""
    return text.translate(_CONTROLS)


class View(Protocol):
    """Where progress goes."""

    def begin(self, title: str, hosts: Iterable[str], seconds: float | None = None) -> None:
        """A new stage over these hosts; `seconds` is how long a host usually takes."""

    def event(self, event: Event) -> None:
        """Something happened."""

    def set(self, host: str, state: str, detail: str = "") -> None:
        """A host's state, decided here and not by an event."""

    def tick(self) -> None:
        """Time passed."""

    def say(self, text: str) -> None:
        """A line that stays."""

    def end(self) -> None:
        """The stage is over."""


@dataclass
class Row:
    """What is known of a host in this stage."""

    state: str = "waiting"
    task: str = ""
    error: str = ""
    began: float = 0.0
    ended: float = 0.0

    def follow(self, event: Event) -> None:
        """Take over what the event says."""
        self.began = self.began or event.at
        if event.kind == "task":
            self.task = event.task
            self.state = "running" if self.state in ("waiting", "running") else self.state
        elif event.kind in ("failed", "unreachable") and not event.ignored:
            self.state = event.kind
            if not self.error:
                self.error = f"{event.task}: {event.error}"


class Silent:
    """For --json: nothing but errors' lines on stderr is wanted while it runs."""

    def begin(self, title: str, hosts: Iterable[str], seconds: float | None = None) -> None: ...
    def event(self, event: Event) -> None: ...
    def set(self, host: str, state: str, detail: str = "") -> None: ...
    def tick(self) -> None: ...
    def say(self, text: str) -> None: ...
    def end(self) -> None: ...


class Lines:
    """One line per thing worth knowing, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows: dict[str, Row] = {}
        self._begun = 0.0

    def begin(self, title: str, hosts: Iterable[str], seconds: float | None = None) -> None:
        self._rows = {host: Row() for host in hosts}
        self._begun = time.time()
        self.say(f"{title}: {len(self._rows)} host{'s' if len(self._rows) != 1 else ''}")

    def event(self, event: Event) -> None:
        row = self._rows.setdefault(event.host, Row())
        known = row.error
        row.follow(event)
        if row.error and not known:
            self.say(f"{event.host}: {row.state}: {printable(row.error)}")

    def set(self, host: str, state: str, detail: str = "") -> None:
        self._rows.setdefault(host, Row()).state = state
        self.say(f"{host}: {state}{': ' + printable(detail) if detail else ''}")

    def tick(self) -> None: ...

    def say(self, text: str) -> None:
        self._console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False, highlight=False, soft_wrap=True)

    def end(self) -> None:
        bad = sum(row.state in ("failed", "unreachable") for row in self._rows.values())
        self.say(f"{len(self._rows) - bad} ok, {bad} not, {time.time() - self._begun:.0f} s")


@dataclass
class Screen:
    """A table that is drawn anew: what happens on each host now, and how far the whole is."""

    console: Console
    _rows: dict[str, Row] = field(default_factory=dict)
    _title: str = ""
    _usual: float | None = None
    _begun: float = 0.0
    _drawn: float = 0.0
    _live: Live | None = None

    def begin(self, title: str, hosts: Iterable[str], seconds: float | None = None) -> None:
        self.end()
        self._rows = {host: Row() for host in hosts}
        self._title, self._usual, self._begun = title, seconds, time.time()
        self._live = Live(self._draw(), console=self.console, auto_refresh=False, transient=True)
        self._live.start()

    def event(self, event: Event) -> None:
        row = self._rows.setdefault(event.host, Row())
        known = row.error
        row.follow(event)
        if row.error and not known:
            self.say(f"{event.host}: {row.state}: {row.error}", style="red")
        self.tick()

    def set(self, host: str, state: str, detail: str = "") -> None:
        row = self._rows.setdefault(host, Row())
        row.state, row.ended = state, time.time()
        if detail:
            self.say(f"{host}: {state}: {detail}", style=STYLES.get(state, ""))
        self.tick()

    def tick(self) -> None:
        # four times a second is smooth enough; a fleet of hundreds sends many more events
        if self._live and time.time() - self._drawn >= 0.25:
            self._drawn = time.time()
            self._live.update(self._draw(), refresh=True)

    def say(self, text: str, style: str = "") -> None:
        self.console.print(Text(printable(text), style=style))

    def end(self) -> None:
        if not self._live:
            return
        self._live.stop()
        self._live = None
        bad = [host for host, row in self._rows.items() if row.state in ("failed", "unreachable", "rescued")]
        line = (
            f"{self._title}: {len(self._rows) - len(bad)} of {len(self._rows)} ok in {time.time() - self._begun:.0f} s"
        )
        self.say(line + (f"; not: {', '.join(bad)}" if bad else ""), style="red" if bad else "green")

    def _draw(self) -> Group:
        now = time.time()
        bad = sum(row.state in ("failed", "unreachable") for row in self._rows.values())
        active = sum(row.state == "running" for row in self._rows.values())
        passed = int(now - self._begun)
        left = f", about {max(1, int(self._usual - (now - self._begun)))} s left" if self._usual else ""
        head = Text.assemble(
            (self._title, "bold"), f"  {len(self._rows)} hosts: {active} at work, ", (f"{bad} failed", "red" if bad else ""),
            f"  {passed} s{left}",
        )  # fmt: skip
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for ratio in (None, None, None, 1):
            table.add_column(ratio=ratio, no_wrap=True, overflow="ellipsis")
        # what needs eyes first, then what moves, then the rest; never more than fits
        order = {"failed": 0, "unreachable": 0, "rescued": 0, "running": 1, "waiting": 2}
        ranked = sorted(self._rows.items(), key=lambda item: order.get(item[1].state, 3))
        room = max(3, self.console.height - 4)
        for host, row in ranked[:room]:
            seconds = f"{(row.ended or now) - row.began:.0f} s" if row.began else ""
            text = printable((row.error or row.task).replace("\n", " "))
            table.add_row(host, Text(row.state, style=STYLES.get(row.state, "")), seconds, Text(text))
        more = [Text(f"… and {len(ranked) - room} more", style="dim")] if len(ranked) > room else []
        return Group(head, table, *more)


def view(json_wanted: bool = False) -> View:
    """The one that fits where output goes."""
    if json_wanted:
        return Silent()
    console = Console()
    return Screen(console) if console.is_terminal and not console.is_dumb_terminal else Lines(console)


def show_json(value: object) -> None:
    """One JSON document on stdout."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")
