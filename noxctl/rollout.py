"""Waves: which hosts, in which order, how many may fail, and what a host must show before the next ones begin."""

from __future__ import annotations

import enum
import hashlib
import math
import re
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from noxctl import places
from noxctl.journal import DONE, Journal, Run
from noxctl.play import End, Event, Options, members, play
from noxctl.view import STYLES, Total, View, printable
from plugins.module_utils.bundle_file import read_contents

# The gate. Each is about what a client would notice, and is wide enough for a busy host's noise.
SLOWER = 3.0  # times as long as before for a small run …
SLOWER_MS = 250.0  # … and by this much
ERROR_RATE = 0.01  # more of all requests answered with 5xx than before …
ERRORS = 3  # … and at least so many
PROBES = 5  # small runs whose median counts

DEFAULT_WAVES = "25%,100%"


class OnFailure(enum.StrEnum):
    """What a failed gate means for the others."""

    STOP = "stop"
    ROLLBACK_ALL = "rollback-all"
    CONTINUE = "continue"


class Unusable(Exception):
    """What was asked can't be done; the message says what to change. Nothing was touched."""


class EdgeLost(Exception):
    """An edge can't be told which hosts serve; the message says why."""


@dataclass(frozen=True)
class Wanted:
    """A rollout as the operator asked for it."""

    bundle: Path
    canary: str = ""
    waves: str = ""
    budget: int = 0
    soak: float = 10.0
    on_failure: OnFailure = OnFailure.STOP
    sha256: str = ""


@dataclass(frozen=True)
class Plan:
    """What follows from it and from the inventory."""

    version: str
    digest: str  # the bundle's SHA-256
    releases: frozenset[str]  # ids in the bundle
    waves: list[tuple[str, list[str]]]

    @classmethod
    def make(cls, wanted: Wanted, hosts: list[str]) -> Plan:
        """Read the bundle and deal the hosts out.

        Raises Unusable: no bundle, another digest than the one given, sizes that mean nothing, an unknown canary.
        """
        contents, digest = read_bundle(wanted.bundle)
        if wanted.sha256 and wanted.sha256.lower() != digest:
            raise Unusable(f"{wanted.bundle}: its SHA-256 is {digest}, not {wanted.sha256}")
        releases = frozenset(one["id"] for one in contents["releases"])
        return cls(contents["version"], digest, releases, deal(hosts, wanted.canary, wanted.waves))


def read_bundle(path: Path) -> tuple[dict[str, Any], str]:
    """What is in a bundle, and its SHA-256; every part is compared with the digest the bundle itself gives.

    Raises Unusable.
    """
    try:
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        with tarfile.open(path, mode="r:") as tar:
            contents = read_contents(tar)
            parts = {f"releases/{one['id']}.tar.gz": one["sha256"] for one in contents["releases"]}
            parts |= {
                contents[key]["file"]: contents[key]["sha256"] for key in ("collection", "sbom") if key in contents
            }
            for name, expected in parts.items():
                handle_of = tar.extractfile(name)
                if handle_of is None or hashlib.sha256(handle_of.read()).hexdigest() != expected:
                    raise Unusable(f"{path}: {name} is damaged; get the bundle again")
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        raise Unusable(f"{path} is no bundle (noxctl bundle makes them): {error}") from None
    return contents, digest


def deal(hosts: list[str], canary: str, waves: str) -> list[tuple[str, list[str]]]:
    """Hosts → waves (name, hosts); the first is the canary. See `noxctl rollout --help` for the words.

    Raises Unusable.
    """
    sizes = [size.strip() for size in waves.split(",") if size.strip()]
    left = list(hosts)
    if not canary:
        first, sizes = (sizes[0], sizes[1:] or ["100%"]) if sizes else ("1", DEFAULT_WAVES.split(","))
        count = _count(first, len(hosts))
        chosen = left[:count]
    elif re.fullmatch(r"\d+%?", canary):
        chosen = left[: _count(canary, len(hosts))]
    else:
        chosen = [name.strip() for name in canary.split(",") if name.strip()]
        if unknown := [name for name in chosen if name not in hosts]:
            raise Unusable(f"--canary {canary}: {', '.join(unknown)} is no host of this rollout")
    dealt = [("canary", chosen)]
    left = [host for host in left if host not in chosen]
    sizes = sizes or DEFAULT_WAVES.split(",")
    counts = [_count(size, len(hosts)) for size in sizes]
    while left:
        number = len(dealt) - 1
        count = counts[min(number, len(counts) - 1)]
        dealt.append((f"wave {number + 1}", left[:count]))
        left = left[count:]
    return dealt


def _count(size: str, hosts: int) -> int:
    match = re.fullmatch(r"(\d+)(%?)", size)
    if not match or int(match[1]) == 0:
        raise Unusable(f"{size!r} is no size of a wave: a number such as 5, or a percentage such as 25%")
    return min(hosts, math.ceil(hosts * int(match[1]) / 100) if match[2] else int(match[1]))


# ── What a host says of itself


def status_of(end: End) -> dict[str, Any]:
    """status.yml's and gate.yml's results of one host, flat. `state`: healthy, unhealthy, not installed, unreachable."""
    found = end.results.get("nox_status", {})
    status, verdict = found.get("status", {}), found.get("verdict", "")
    reachable = end.word != "unreachable"
    healthy = bool(status.get("healthy"))
    problem = status.get("problem", "") or end.error
    state = "unreachable" if not reachable else "healthy" if healthy else "unhealthy"
    if status and not status["installed"]:
        state = "not installed"
    return {
        "host": end.host,
        "reachable": reachable,
        "version": status.get("version", ""),
        "release": status.get("release", ""),
        "healthy": healthy,
        "drift": {"absent": "not installed", "": "unknown"}.get(verdict, verdict),
        "state": state,
        "problem": problem.splitlines()[0] if problem else "",
        **{
            key: status.get(key)
            for key in (
                "last_healthy", "proven", "restarts", "requests", "server_errors", "request_seconds", "probe_ms",
                "token_age_days", "certificate_days",
            )
        },
        "last_run": status.get("last_run", ""),
        "findings": [finding_text(one) for one in found.get("findings", [])],
    }  # fmt: skip


def finding_text(finding: dict[str, Any]) -> str:
    """What differs on a host from its record, in one line."""
    return f"{finding['id']} {finding['what']}: {finding['found']}, not {finding['expected']}"


def judge(before: dict[str, Any], after: dict[str, Any], releases: frozenset[str]) -> str:
    """Why a host doesn't pass its gate; empty when it does. `before` may be empty: a host that had no Nox."""
    if not after["reachable"]:
        return "unreachable"
    if not after["healthy"]:
        return after["problem"] or "not healthy"
    if after["release"] not in releases:
        return f"runs {after['release'] or 'nothing'}, which isn't in the bundle"
    if restarted := [name for name, count in (after["restarts"] or {}).items() if count]:
        return f"{', '.join(restarted)} had to be restarted by systemd"
    errors, requests = after["server_errors"] or 0, after["requests"] or 0
    rate_before = (before.get("server_errors") or 0) / max(1, before.get("requests") or 0)
    if errors >= ERRORS and errors / max(1, requests) > rate_before + ERROR_RATE:
        return f"{errors:.0f} of {requests:.0f} requests answered with 5xx ({rate_before:.1%} before)"
    old, new = before.get("probe_ms"), after["probe_ms"]
    if old and new and new > old * SLOWER and new > old + SLOWER_MS:
        return f"a small run takes {new:.0f} ms, {old:.0f} ms before"
    return ""


# ── The rollout itself


@dataclass
class Result:
    """How a rollout ended."""

    run: str
    outcome: str  # done, stopped, paused, aborted
    reason: str
    exit_code: int
    version: str
    hosts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "run": self.run, "outcome": self.outcome, "reason": self.reason, "exit_code": self.exit_code,
            "version": self.version,
            "hosts": [
                {
                    "host": host, "state": row["state"], "wave": row["wave"], "task": row["task"], "error": row["error"],
                    "release_before": row["before"].get("release", ""), "release_after": row["after"].get("release", ""),
                }
                for host, row in self.hosts.items()
            ],
        }  # fmt: skip

    def table(self) -> Table:
        """For people."""
        table = Table("host", "wave", "state", "before", "after", box=None, pad_edge=False)
        for host, row in self.hosts.items():
            wave = "" if row["wave"] is None else "canary" if row["wave"] == 0 else str(row["wave"])
            table.add_row(
                host, wave, Text(row["state"], style=STYLES.get(row["state"], "")), row["before"].get("release", ""),
                row["after"].get("release", ""),
            )  # fmt: skip
        return table

    def errors(self) -> list[str]:
        """A line for each host that has one."""
        return [
            printable(f"{host}: {row['task']}: {row['error'].splitlines()[0]}")
            for host, row in self.hosts.items()
            if row["error"]
        ]


def plan_table(plan: Plan, proven: frozenset[str] = frozenset()) -> Table:
    """What is about to happen; nothing to the hosts that are `proven`."""
    table = Table("wave", "hosts", "", box=None, pad_edge=False)
    for name, of_wave in plan.waves:
        if not (hosts := [host for host in of_wave if host not in proven]):
            continue
        shown = ", ".join(hosts[:8]) + (f" … {hosts[-1]}" if len(hosts) > 8 else "")
        table.add_row(name, str(len(hosts)), shown)
    return table


def unfinished(journal: Journal, inventory: Path) -> Run:
    """The rollout that --resume goes on with. Raises Unusable where the last one is done, or there is none."""
    for run in journal.runs(verb="rollout", inventory=inventory, limit=1):
        if run.outcome != "done":
            return run
    raise Unusable(f"No rollout of {inventory} is unfinished; noxctl runs lists them")


def resumed(plan: Plan, run: Run, journal: Journal) -> Plan:
    """The plan with the waves of an unfinished run and the inventory of today: who left is gone, who is new comes last."""
    now = [host for _, hosts in plan.waves for host in hosts]
    old = [(wave["name"], wave["hosts"]) for wave in journal.waves(run.id)]
    known = {host for _, hosts in old for host in hosts}
    waves = [(name, [host for host in hosts if host in now]) for name, hosts in old]
    waves.append((f"wave {len(waves)}", [host for host in now if host not in known]))
    return replace(plan, waves=[(name, hosts) for name, hosts in waves if hosts])


class Rollout:
    """One rollout, from its plan to its end. Every decision is in the journal before it has an effect."""

    def __init__(
        self, plan: Plan, wanted: Wanted, options: Options, journal: Journal, view: View, old: Run | None = None
    ) -> None:
        """`old` is what `plan` was resumed from. Raises Unusable where that was of another bundle, or isn't the last one any more."""
        self._plan, self._wanted, self._options, self._journal, self._view = plan, wanted, options, journal, view
        self._waves = plan.waves
        self._interrupts = 0
        self._began = time.time()
        if old is None:
            about = {
                "bundle": str(wanted.bundle.resolve()), "version": plan.version, "budget": wanted.budget, "soak": wanted.soak,
                "on_failure": str(wanted.on_failure), "limit": options.limit,
            }  # fmt: skip
            self.run = journal.begin("rollout", options.inventory, plan.digest, about)
        else:
            # chosen before the operator agreed, when nothing was locked yet
            if unfinished(journal, options.inventory).id != old.id:
                raise Unusable(f"Meanwhile there was another rollout than {old.id}; noxctl runs lists them")
            if old.target != plan.digest:
                raise Unusable(
                    f"The rollout to go on with ({old.id}, {old.outcome}) is of another bundle, with SHA-256 {old.target}: "
                    f"{old.options.get('bundle')}. Give that one, or begin anew without --resume."
                )
            self.run = old.id
            now = {host for _, hosts in plan.waves for host in hosts}
            known = {host for wave in journal.waves(old.id) for host in wave["hosts"]}
            for host in sorted(known - now):
                journal.host(old.id, host, state="gone")
                journal.note(old.id, f"{host} is no longer in the inventory")
            if now - known:
                journal.note(old.id, f"new in the inventory: {', '.join(sorted(now - known))}")
            journal.again(old.id)
        journal.plan(self.run, self._waves)

    def go(self) -> Result:
        """All waves, or as many as the gates let through."""
        with self._interruptible():
            outcome, reason = self._go()
        self._journal.note(self.run, reason)
        self._journal.end(self.run, outcome)
        rows = self._journal.hosts(self.run)
        return Result(self.run, outcome, reason, exit_code(outcome, rows), self._plan.version, rows)

    def _go(self) -> tuple[str, str]:
        try:
            self._look_before()
        except EdgeLost as error:
            return "stopped", f"Stopped before anything was touched: {error}"
        for number, (name, hosts) in enumerate(self._waves):
            todo = [host for host in hosts if self._state(host) not in DONE]
            if not todo:
                self._journal.wave(self.run, number, "done")
                continue
            if self._interrupts:
                return "paused", f"Paused before {name}, as asked. Go on with --resume."
            self._journal.wave(self.run, number, "running")
            try:
                self._change(name, todo)
            except EdgeLost as error:
                for host in todo:
                    if self._state(host) == "running":
                        why = "changed, but not put to its gate, because the edge doesn't obey"
                        self._journal.host(self.run, host, state="failed", error=why, ended=time.time())
                self._journal.wave(self.run, number, "failed")
                return "stopped", f"Stopped in {name}: {error}"
            bad = [host for host in todo if self._state(host) not in DONE]
            self._journal.wave(self.run, number, "failed" if bad else "done")
            self._view.total(self._total())
            if self._interrupts > 1:
                return "aborted", f"Ended in {name}, as asked. Go on with --resume."
            if reason := self._stop(number, name, bad):
                if self._wanted.on_failure is OnFailure.ROLLBACK_ALL:
                    try:
                        self._roll_back_all()
                    except EdgeLost as error:
                        reason = f"{reason} The way back of the others was not gone: {error}"
                return "stopped", reason
        bad = [host for host, row in self._journal.hosts(self.run).items() if row["state"] not in (*DONE, "gone")]
        where = f" in {self._options.limit}" if self._options.limit else ""
        return "done", f"{self._plan.version} is everywhere{where}." if not bad else (
            f"Done within the budget; not on {self._plan.version}: {', '.join(bad)}"
        )

    # ── Steps

    def _look_before(self) -> None:
        hosts = [host for _, names in self._waves for host in names if self._state(host) not in DONE]
        if not hosts:
            return
        for host, end in self._play("status.yml", "Look at the fleet", hosts, {"nox_status_probe": PROBES}).items():
            status = status_of(end)
            known = self._journal.hosts(self.run)[host]["before"]
            # of a rollout that goes on, what was there at its beginning counts
            if not known.get("release") or known["release"] in self._plan.releases:
                self._journal.host(self.run, host, before=status)
            # a host that was begun with has not passed its gate, however well it is
            if self._state(host) == "waiting" and self._is_there(status):
                self._journal.host(self.run, host, state="already", after=status)
        # one that was lost, say, and is well again, but that nobody has put back
        there = [host for host in hosts if self._state(host) == "already"]
        self._edge("behind the edge: who runs it already", restore=there)

    def _is_there(self, status: dict[str, Any]) -> bool:
        """Whether a host has nothing to gain: it runs this very release, healthy and without drift."""
        return (
            status["healthy"]
            and status["release"] in self._plan.releases
            and bool(status["proven"])
            and status["drift"] == "clean"
        )

    def _change(self, name: str, hosts: list[str]) -> None:
        """Upgrade these hosts, let them soak, put them to the gate, take back who fails it."""
        self._edge(f"{name}: out of the edge", drain=hosts)
        for host in hosts:
            self._journal.host(self.run, host, state="running", started=time.time(), ended=None, task="", error="")
        variables = {"nox_release_bundle": str(self._wanted.bundle.resolve())}
        ends = self._play("upgrade.yml", f"{name}: upgrade", hosts, variables)
        for host in hosts:
            end = ends.get(host, End(host, unreachable=1, error="Ansible never came to this host"))
            if end.word != "ok":
                # upgrade.yml has already taken a failed host back to its last healthy release
                self._journal.host(self.run, host, state=end.word, task=end.task, error=end.error, ended=time.time())
        passed = [host for host in hosts if self._state(host) == "running"]
        if passed and self._interrupts < 2:
            # the soak is with real requests
            self._edge(f"{name}: back behind the edge", restore=passed)
            self._soak(name)
            self._gate(name, passed)
        reached = [host for host in hosts if self._state(host) != "unreachable"]
        if reached and [host for host in hosts if self._state(host) not in DONE]:
            statuses = {
                host: status_of(end)
                for host, end in self._play("status.yml", f"{name}: where they are now", reached, {}).items()
            }
            for host, status in statuses.items():
                self._journal.host(self.run, host, after=status)
            # who went back to a release that passes its tests may serve again; who is not healthy stays out
            well = [host for host, status in statuses.items() if status["healthy"] and status["proven"]]
            self._edge(f"{name}: back behind the edge", restore=well)

    def _soak(self, name: str) -> None:
        end = time.time() + self._wanted.soak
        if self._wanted.soak:
            self._view.say(f"{name}: {self._wanted.soak:g} s of soak")
        while time.time() < end and self._interrupts < 2:
            time.sleep(min(0.2, max(0.0, end - time.time())))

    def _gate(self, name: str, hosts: list[str]) -> None:
        rows = self._journal.hosts(self.run)
        ends = self._play("gate.yml", f"{name}: gate", hosts, {"nox_status_probe": PROBES})
        refused: dict[str, str] = {}
        for host in hosts:
            end = ends.get(host, End(host, unreachable=1))
            after = status_of(end)
            problem = (
                end.error or end.word if end.word != "ok" else judge(rows[host]["before"], after, self._plan.releases)
            )
            if not problem:
                self._journal.host(self.run, host, state="done", after=after, ended=time.time())
                self._view.set(host, "done")
                continue
            state = "unreachable" if end.word == "unreachable" else "failed"
            refused[host] = state
            self._journal.host(self.run, host, state=state, task=end.task or "gate", error=problem, ended=time.time())
            self._view.set(host, state, problem)
        # a host that can't be asked can't be taken back either: it serves nobody until somebody has looked
        self._edge(f"{name}: out of the edge", drain=[host for host in refused if refused[host] == "unreachable"])
        self._roll_back(f"{name}: back to what was healthy", [host for host in refused if refused[host] == "failed"])

    def _roll_back(self, title: str, hosts: list[str]) -> None:
        """Take hosts back to the release each had before; those that had none are left as they are, and said so."""
        rows = self._journal.hosts(self.run)
        groups: dict[tuple[str, str], list[str]] = {}
        for host in hosts:
            release = rows[host]["before"].get("release", "")
            if not release or release in self._plan.releases:
                self._journal.note(self.run, f"{host}: there is no release to go back to")
                continue
            left = rows[host]["after"].get("release", "") if rows[host]["state"] == "failed" else ""
            groups.setdefault((release, left), []).append(host)
        self._edge(f"{title}: out of the edge", drain=hosts)
        for (release, left), names in groups.items():
            variables = {"nox_release_back_to": release, "nox_release_failed": left}
            ends = self._play("rollback.yml", f"{title} ({release})", names, variables)
            for host in names:
                end = ends.get(host, End(host, unreachable=1, error="unreachable"))
                error = rows[host]["error"] or "taken back with the others"
                if end.word == "ok":
                    self._journal.host(self.run, host, state="rolled back", error=error)
                    self._view.set(host, "rolled back")
                else:
                    self._journal.host(self.run, host, error=f"{error}; the way back failed too: {end.error}")

    def _roll_back_all(self) -> None:
        hosts = [host for host, row in self._journal.hosts(self.run).items() if row["state"] == "done"]
        if hosts:
            self._roll_back("all back to what was healthy", hosts)
            back = [host for host in hosts if self._state(host) == "rolled back"]
            self._edge("back behind the edge", restore=back)

    def _edge(self, title: str, *, drain: list[str] | None = None, restore: list[str] | None = None) -> None:
        """Take hosts out of the edge, or put them back; nothing where the inventory has no edge. Raises EdgeLost."""
        edges = members(replace(self._options, limit=""), "nox_edge")
        if not edges or not (drain or restore):
            return
        ends = self._play("drain.yml", title, edges, {"nox_drain": drain or [], "nox_restore": restore or []})
        if lost := [f"{host}: {end.error}" for host, end in ends.items() if end.word != "ok"]:
            raise EdgeLost(f"the edge doesn't obey, so requests would be lost. {'; '.join(lost)}")

    def _stop(self, number: int, name: str, bad: list[str]) -> str:
        """Why the rollout ends after this wave; empty when it goes on."""
        if not bad:
            return ""
        names = ", ".join(bad)
        if number == 0:
            return f"Stopped after the canary: {names}. No other host was touched."
        if self._wanted.on_failure is OnFailure.CONTINUE:
            return ""
        spent = [
            host for host, row in self._journal.hosts(self.run).items()
            if row["state"] in ("failed", "unreachable", "rescued", "rolled back") and row["wave"]
        ]  # fmt: skip
        if len(spent) <= self._wanted.budget:
            self._journal.note(self.run, f"{name}: {names} spent {len(spent)} of a budget of {self._wanted.budget}")
            return ""
        left = sum(len(hosts) for _, hosts in self._waves[number + 1 :])
        untouched = f" Not touched: {left} more." if left else ""
        return f"Stopped after {name}: {names}; {len(spent)} failed, the budget is {self._wanted.budget}.{untouched}"

    # ── Small things

    def _state(self, host: str) -> str:
        return str(self._journal.hosts(self.run).get(host, {}).get("state", "waiting"))

    def _total(self) -> Total:
        """How far it is. A wave that went well lately says how long the others will take."""
        rows, waves = self._journal.hosts(self.run), self._journal.waves(self.run)
        states = Counter(row["state"] for row in rows.values() if row["state"] != "gone")
        done = sum(states[state] for state in DONE)
        left = states["waiting"] + states["running"]
        usual = self._journal.usual_wave_seconds(self._options.inventory)
        ends = None
        if usual and left:
            todo = sum(wave["outcome"] in ("waiting", "running") for wave in waves)
            began = next((wave["started"] for wave in waves if wave["outcome"] == "running"), time.time())
            if time.time() < began + usual:  # else it isn't as usual, and nobody knows
                ends = began + usual * todo
        shown = [(wave["name"], len(wave["hosts"]), wave["outcome"]) for wave in waves]
        title = f"rollout of {self._plan.version}"
        return Total(title, shown, done, states.total() - done - left, left, self._began, ends)

    def _play(self, playbook: str, title: str, hosts: list[str], variables: dict[str, Any]) -> dict[str, End]:
        self._view.total(self._total())
        self._view.begin(title, hosts, None)

        def on_event(event: Event) -> None:
            self._view.event(event)
            if event.kind != "task":
                self._journal.step(self.run, event)

        try:
            return play(
                playbook, self._options, hosts=hosts, variables=variables, on_event=on_event, on_tick=self._view.tick,
                log=places.state() / "runs" / self.run / "ansible.log", cancelled=lambda: self._interrupts > 1,
            )  # fmt: skip
        finally:
            self._view.end()

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """The first Ctrl-C pauses after the wave, the second ends Ansible."""

        def interrupt(number: int, frame: object) -> None:
            self._interrupts += 1
            self._view.say(
                "Pausing after this wave; once more to end it at once." if self._interrupts == 1 else "Ending Ansible."
            )

        old = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, old)


def exit_code(outcome: str, rows: dict[str, dict[str, Any]]) -> int:
    """0 done, 1 done with failures inside the budget or interrupted, 5 stopped by a gate, 6 for unreachable hosts alone."""
    states = Counter(row["state"] for row in rows.values())
    failed = states["failed"] + states["rescued"] + states["rolled back"]
    if outcome == "stopped":  # by hosts that were unreachable alone, an edge included, or by a gate
        return 5 if failed else 6
    if states["unreachable"] and not failed:
        return 6
    return 0 if outcome == "done" and not failed else 1
