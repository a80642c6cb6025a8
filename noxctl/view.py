"""What a person sees while a playbook runs: one table that is drawn anew on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import sys
import textwrap
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

SHOWN_LINES = 10  # of an error, while others are at work

STYLES = {
    "done": "green", "ok": "green", "already": "green", "clean": "green", "healthy": "green", "running": "cyan",
    "failed": "bold red", "unreachable": "bold magenta", "rescued": "bold red", "rolled back": "yellow",
    "drifted": "yellow", "waiting": "dim", "not installed": "yellow",
}  # fmt: skip


def printable(text: str) -> str:
    """`text` without control characters."""
    return text.translate(_CONTROLS)


@dataclass(frozen=True)
class Total:
    """How far the whole of a rollout is; of one playbook there is none."""

    title: str
    waves: list[tuple[str, int, str]]  # name, hosts, outcome: waiting, running, done, failed
    done: int
    failed: int
    left: int
    began: float  # seconds since the epoch
    ends: float | None = None  # when it probably will; None where nothing is known yet

    def counts(self) -> str:
        """3 done, 1 failed, 16 left."""
        return f"{self.done} done, {self.failed} failed, {self.left} left"

    def time_left(self) -> str:
        """About how long it still takes, with a comma before it; empty where that isn't known."""
        return f", about {span(max(1.0, self.ends - time.time()))} left" if self.ends else ""


def span(seconds: float) -> str:
    """12 s, 3 min 5 s."""
    whole = round(seconds)
    return f"{whole} s" if whole < 120 else f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 else "")


class View(Protocol):
    """Where progress goes."""

    def total(self, total: Total) -> None:
        """How far the whole is, before each stage and after each wave."""

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
    where: str = ""  # the task of its first error
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
                self.where, self.error = event.task, event.error

    def why(self, host: str) -> str:
        """The first error of a host: the task, how its message begins, and the journal's last lines. The report has all."""
        lines = printable(self.error).splitlines()
        if len(lines) > SHOWN_LINES:
            lines = [lines[0], "…", *lines[2 - SHOWN_LINES :]]
        return f"{host}: {self.state} in {self.where}\n{textwrap.indent(chr(10).join(lines), '    ')}"


class Silent:
    """For --json: nothing but errors' lines on stderr is wanted while it runs."""

    def total(self, total: Total) -> None: ...
    def begin(self, title: str, hosts: Iterable[str], seconds: float | None = None) -> None: ...
    def event(self, event: Event) -> None: ...
    def set(self, host: str, state: str, detail: str = "") -> None: ...
    def tick(self) -> None: ...
    def say(self, text: str) -> None: ...
    def end(self) -> None: ...


class Lines:
    """One line per thing worth knowing, for logs and pipes."""

    def __init__(self, console: Console, good: str = "ok") -> None:
        self._console = console
        self._good = good
        self._rows: dict[str, Row] = {}
        self._begun = 0.0
        self._counts = ""

    def total(self, total: Total) -> None:
        if (counts := total.counts()) != self._counts:
            self._counts = counts
            self.say(f"{total.title}: {counts}{total.time_left()}")

    def begin(self, title: str, hosts: Iterable[str], seconds: float | None = None) -> None:
        self._rows = {host: Row() for host in hosts}
        self._begun = time.time()
        self.say(f"{title}: {count(len(self._rows), 'host')}")

    def event(self, event: Event) -> None:
        row = self._rows.setdefault(event.host, Row())
        known = row.error
        row.follow(event)
        if row.error and not known:
            self.say(row.why(event.host))

    def set(self, host: str, state: str, detail: str = "") -> None:
        self._rows.setdefault(host, Row()).state = state
        self.say(f"{host}: {state}{': ' + printable(detail) if detail else ''}")

    def tick(self) -> None: ...

    def say(self, text: str) -> None:
        self._console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False, highlight=False, soft_wrap=True)

    def end(self) -> None:
        bad = sum(row.state in ("failed", "unreachable") for row in self._rows.values())
        self.say(f"{len(self._rows) - bad} {self._good}, {bad} not, {time.time() - self._begun:.0f} s")


@dataclass
class Screen:
    """A table that is drawn anew: what happens on each host now, and how far the whole is."""

    console: Console
    good: str = "ok"  # what a host is called with which nothing went wrong
    _rows: dict[str, Row] = field(default_factory=dict)
    _title: str = ""
    _usual: float | None = None
    _begun: float = 0.0
    _drawn: float = 0.0
    _live: Live | None = None
    _total: Total | None = None

    def total(self, total: Total) -> None:
        self._total = total

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
            self.say(row.why(event.host), style="red")
            self._drawn = 0.0
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
        fine, seconds = len(self._rows) - len(bad), time.time() - self._begun
        line = f"{self._title}: {fine} of {len(self._rows)} {self.good} in {seconds:.0f} s"
        self.say(line + (f"; not: {', '.join(bad)}" if bad else ""), style="red" if bad else "green")

    def _draw(self) -> Group:
        now = time.time()
        bad = sum(row.state in ("failed", "unreachable") for row in self._rows.values())
        active = sum(row.state == "running" for row in self._rows.values())
        passed = int(now - self._begun)
        left = f", about {span(max(1.0, self._usual - (now - self._begun)))} left" if self._usual else ""
        head = Text.assemble(
            (self._title, "bold"), f"  {count(len(self._rows), 'host')}, {active} at work",
            (f", {bad} failed" if bad else "", "red"), f"  {span(passed)}{left}",
        )  # fmt: skip
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        widths = [min(24, max(map(len, self._rows), default=0)), max(map(len, STYLES)), 6]
        for width in (*widths, max(20, self.console.width - sum(widths) - 2 * 4)):
            table.add_column(width=width, no_wrap=True, overflow="ellipsis")
        # what needs eyes first, then what moves, then the rest; never more than fits
        order = {"failed": 0, "unreachable": 0, "rescued": 0, "running": 1, "waiting": 2}
        ranked = sorted(self._rows.items(), key=lambda item: order.get(item[1].state, 3))
        above = self._draw_total(bad)
        room = max(3, self.console.height - 4 - len(above))
        for host, row in ranked[:room]:
            seconds = f"{(row.ended or now) - row.began:.0f} s" if row.began else ""
            # the whole error stands above
            text = printable(f"{row.where}: {row.error.splitlines()[0]}" if row.error else row.task)
            table.add_row(host, Text(row.state, style=STYLES.get(row.state, "")), seconds, Text(text))
        more = [Text(f"… and {len(ranked) - room} more", style="dim")] if len(ranked) > room else []
        return Group(*above, head, table, *more)

    def _draw_total(self, bad: int) -> list[Text]:
        """The waves, and how far the whole is, with those that have just failed."""
        total = self._total
        if total is None:
            return []
        marks = {"done": ("✔", "green"), "failed": ("✘", "bold red"), "running": ("▶", "bold cyan")}
        waves = Text("  ")
        for name, hosts, outcome in total.waves:
            mark, style = marks.get(outcome, ("·", "dim"))
            waves.append(f"{mark} {name} ({hosts})   ", style=style)
        head = Text.assemble(
            (total.title, "bold"), f"  {total.done} done, ",
            (f"{total.failed + bad} failed", "red" if total.failed + bad else ""),
            f", {max(0, total.left - bad)} left  {span(time.time() - total.began)}{total.time_left()}",
        )  # fmt: skip
        return [head, waves, Text()]


def count(number: int, what: str) -> str:
    """1 host, 2 hosts."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def view(json_wanted: bool = False, good: str = "ok") -> View:
    """The one that fits where output goes."""
    if json_wanted:
        return Silent()
    console = Console()
    return Screen(console, good) if console.is_terminal and not console.is_dumb_terminal else Lines(console, good)


def show_json(value: object) -> None:
    """One JSON document on stdout."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")
