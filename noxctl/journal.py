"""What was done to which host, on disk before and after each step: what --resume and the reports go by."""

from __future__ import annotations

import fcntl
import getpass
import hashlib
import json
import os
import secrets
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noxctl.places import state
from noxctl.play import Event

_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
  id TEXT PRIMARY KEY, verb TEXT NOT NULL, inventory TEXT NOT NULL, target TEXT NOT NULL, options TEXT NOT NULL,
  controller TEXT NOT NULL, started REAL NOT NULL, ended REAL, outcome TEXT NOT NULL DEFAULT 'running');
CREATE TABLE IF NOT EXISTS waves (
  run TEXT NOT NULL REFERENCES runs(id), number INTEGER NOT NULL, name TEXT NOT NULL, hosts TEXT NOT NULL,
  started REAL, ended REAL, outcome TEXT NOT NULL DEFAULT 'waiting', PRIMARY KEY (run, number));
CREATE TABLE IF NOT EXISTS hosts (
  run TEXT NOT NULL REFERENCES runs(id), host TEXT NOT NULL, wave INTEGER, state TEXT NOT NULL DEFAULT 'waiting',
  before TEXT NOT NULL DEFAULT '{}', after TEXT NOT NULL DEFAULT '{}', task TEXT NOT NULL DEFAULT '',
  error TEXT NOT NULL DEFAULT '', started REAL, ended REAL, PRIMARY KEY (run, host));
CREATE TABLE IF NOT EXISTS steps (
  run TEXT NOT NULL REFERENCES runs(id), host TEXT NOT NULL, task TEXT NOT NULL, started REAL NOT NULL,
  seconds REAL NOT NULL, outcome TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS steps_of_run ON steps (run, host);
CREATE TABLE IF NOT EXISTS notes (run TEXT NOT NULL REFERENCES runs(id), at REAL NOT NULL, text TEXT NOT NULL);
"""

# In the environment of the Ansible that a noxctl with a lock runs. It outlives a noxctl that is killed.
_MARK = "NOXCTL_LOCK"
ORPHAN_SECONDS = 5.0  # to end when asked, before it is killed

# A host's states, in the order of a rollout. Only these two are proven: such a host isn't touched again by --resume.
DONE = ("done", "already")


@dataclass(frozen=True)
class Run:
    """A row of `runs`; times in seconds since the epoch."""

    id: str
    verb: str
    inventory: str
    target: str  # what is rolled out: a bundle's SHA-256, or ""
    options: dict[str, Any]
    controller: str
    started: float
    ended: float | None
    outcome: str  # running, done, stopped, paused, failed, aborted


class Journal:
    """The SQLite file. Every method is one transaction, so a controller that is killed leaves what was true."""

    def __init__(self, path: Path | None = None) -> None:
        path = path or state() / "journal.db"
        self._database = sqlite3.connect(path, isolation_level=None)
        path.chmod(0o600)
        self._database.row_factory = sqlite3.Row
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA busy_timeout=5000")
        self._database.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _do(self, statement: str, *values: Any) -> list[sqlite3.Row]:
        return self._database.execute(statement, values).fetchall()

    # ── Runs

    def begin(self, verb: str, inventory: Path, target: str = "", options: dict[str, Any] | None = None) -> str:
        """A new run; its id sorts by time."""
        run = time.strftime("%Y%m%d-%H%M%S-", time.gmtime()) + secrets.token_hex(2)
        self._do(
            "INSERT INTO runs (id, verb, inventory, target, options, controller, started) VALUES (?,?,?,?,?,?,?)",
            run, verb, str(inventory.resolve()), target, json.dumps(options or {}), controller(), time.time(),
        )  # fmt: skip
        return run

    def end(self, run: str, outcome: str) -> None:
        """How it ended."""
        self._do("UPDATE runs SET ended=?, outcome=? WHERE id=?", time.time(), outcome, run)

    def again(self, run: str) -> None:
        """It goes on."""
        self._do("UPDATE runs SET ended=NULL, outcome='running', controller=? WHERE id=?", controller(), run)

    def run(self, run: str) -> Run | None:
        """One run, by its id or the beginning of it."""
        found = self._do("SELECT * FROM runs WHERE id LIKE ? ORDER BY rowid DESC LIMIT 1", run.replace("%", "") + "%")
        return _run(found[0]) if found else None

    def runs(self, *, verb: str = "", inventory: Path | None = None, limit: int = 20) -> list[Run]:
        """The newest first; by the order they began in, whatever the clock said."""
        rows = self._do(
            "SELECT * FROM runs WHERE (?1 = '' OR verb = ?1) AND (?2 = '' OR inventory = ?2)"
            " ORDER BY rowid DESC LIMIT ?3",
            verb, str(inventory.resolve()) if inventory else "", limit,
        )  # fmt: skip
        return [_run(row) for row in rows]

    def note(self, run: str, text: str) -> None:
        """A decision, in words."""
        self._do("INSERT INTO notes VALUES (?,?,?)", run, time.time(), text)

    def notes(self, run: str) -> list[tuple[float, str]]:
        """All decisions, in order."""
        return [(row["at"], row["text"]) for row in self._do("SELECT * FROM notes WHERE run=? ORDER BY at", run)]

    # ── Waves and hosts

    def plan(self, run: str, waves: list[tuple[str, list[str]]]) -> None:
        """Write the waves (name, hosts). Hosts that are known keep their state."""
        with self._transaction():
            self._do("DELETE FROM waves WHERE run=?", run)
            for number, (name, hosts) in enumerate(waves):
                self._do(
                    "INSERT INTO waves (run, number, name, hosts) VALUES (?,?,?,?)",
                    run,
                    number,
                    name,
                    json.dumps(hosts),
                )
                for host in hosts:
                    self._do(
                        "INSERT INTO hosts (run, host, wave) VALUES (?,?,?)"
                        " ON CONFLICT (run, host) DO UPDATE SET wave=excluded.wave",
                        run, host, number,
                    )  # fmt: skip

    def wave(self, run: str, number: int, outcome: str) -> None:
        """A wave began (`running`) or ended."""
        column = "started" if outcome == "running" else "ended"
        self._do(f"UPDATE waves SET outcome=?, {column}=? WHERE run=? AND number=?", outcome, time.time(), run, number)  # noqa: S608

    def waves(self, run: str) -> list[dict[str, Any]]:
        """number, name, hosts, started, ended, outcome."""
        rows = self._do("SELECT * FROM waves WHERE run=? ORDER BY number", run)
        return [{**dict(row), "hosts": json.loads(row["hosts"])} for row in rows]

    def host(self, run: str, host: str, **values: Any) -> None:
        """Set some of state, before, after (both dicts), task, error, started, ended."""
        values = {key: json.dumps(value) if isinstance(value, dict) else value for key, value in values.items()}
        self._do("INSERT OR IGNORE INTO hosts (run, host) VALUES (?,?)", run, host)
        columns = ", ".join(f"{key}=?" for key in values)
        self._do(f"UPDATE hosts SET {columns} WHERE run=? AND host=?", *values.values(), run, host)  # noqa: S608

    def hosts(self, run: str) -> dict[str, dict[str, Any]]:
        """Host → its row, `before` and `after` parsed."""
        return {
            row["host"]: {**dict(row), "before": json.loads(row["before"]), "after": json.loads(row["after"])}
            for row in self._do("SELECT * FROM hosts WHERE run=? ORDER BY wave, host", run)
        }

    def step(self, run: str, event: Event) -> None:
        """A task that ended on a host."""
        self._do(
            "INSERT INTO steps VALUES (?,?,?,?,?,?)",
            run, event.host, event.task, event.at - event.seconds, event.seconds, event.kind,
        )  # fmt: skip

    def steps(self, run: str) -> list[dict[str, Any]]:
        """host, task, started, seconds, outcome; in order."""
        return [dict(row) for row in self._do("SELECT * FROM steps WHERE run=? ORDER BY started", run)]

    def usual_seconds(self, verb: str) -> float | None:
        """The median time of a host in earlier runs of this verb; None where there is none."""
        rows = self._do(
            "SELECT h.ended - h.started AS seconds FROM hosts h JOIN runs r ON r.id = h.run WHERE r.verb=?"
            " AND h.state='done' AND h.ended IS NOT NULL ORDER BY h.ended DESC LIMIT 200",
            verb,
        )
        found = sorted(row["seconds"] for row in rows)
        return found[len(found) // 2] if found else None

    def usual_wave_seconds(self, inventory: Path) -> float | None:
        """The median time of a wave that went well, in the last rollouts of this inventory; None where there is none."""
        rows = self._do(
            "SELECT w.ended - w.started AS seconds FROM waves w JOIN runs r ON r.id = w.run WHERE r.inventory=?"
            " AND w.outcome='done' AND w.started IS NOT NULL AND w.ended IS NOT NULL ORDER BY w.ended DESC LIMIT 20",
            str(inventory.resolve()),
        )
        found = sorted(row["seconds"] for row in rows)
        return found[len(found) // 2] if found else None

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")


def _run(row: sqlite3.Row) -> Run:
    values = {key: row[key] for key in row.keys() if key != "options"}  # noqa: SIM118  a Row iterates over values
    return Run(**values, options=json.loads(row["options"]))


def controller() -> str:
    """Who this is, for others to read: user@machine, process."""
    return f"{getpass.getuser()}@{socket.gethostname()} pid {os.getpid()}"


class Locked(Exception):
    """Another controller is changing this inventory's hosts; the message says who, what and since when."""


@contextmanager
def locked(inventory: Path, what: str) -> Iterator[None]:
    """Hold the inventory for one change at a time. The kernel lets go when this process ends, however it ends.

    Where a noxctl was killed, its Ansible goes on, and may wait for ever for what it has lost: that is ended. Raises Locked.
    """
    directory = state() / "locks"
    directory.mkdir(mode=0o700, exist_ok=True)
    name = hashlib.sha256(str(inventory.resolve()).encode()).hexdigest()[:16]
    descriptor = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Locked(_holder(os.pread(descriptor, 4096, 0), inventory)) from None
        about = {"who": controller(), "what": what, "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(about).encode(), 0)
        _end_orphans(name)
        os.environ[_MARK] = name
        yield
    finally:
        os.environ.pop(_MARK, None)
        os.close(descriptor)


def _end_orphans(name: str) -> None:
    """End the Ansible that a noxctl which was killed has left. What it began on a host goes on there until that task ends."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + ORPHAN_SECONDS
        told: set[int] = set()
        while (found := set(_orphans(name))) and time.monotonic() < deadline:
            for pid in found - told:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            told |= found
            time.sleep(0.1)
        if told:
            sys.stderr.write("noxctl: ended the Ansible of a noxctl that was killed\n")
        if not found:
            return


def _orphans(name: str) -> list[int]:
    """Processes of Ansible that a noxctl with this lock has left; where there is no /proc, none can be told."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ansible = b"ansible-playbook" in (process / "cmdline").read_bytes()  # and no ssh that keeps a connection
            if ansible and f"{_MARK}={name}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue  # it has ended, or is somebody else's
    return found


def _holder(text: bytes, inventory: Path) -> str:
    try:
        about = json.loads(text)
        return f"{inventory} is locked: {about['what']} by {about['who']} since {about['since']}"
    except (ValueError, KeyError):
        return f"{inventory} is locked by another noxctl that has only just begun"
