"""noxctl as an operator types it, releases good and bad, and what can happen to a fleet meanwhile."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lab import process  # noqa: E402
from lab.state import Host, load_lab  # noqa: E402
from noxctl.journal import Journal  # noqa: E402
from tests import releases  # noqa: E402

INVENTORY = Path(os.environ["NOX_INVENTORY"])
LAB = f"m-{os.environ['MOLECULE_SCENARIO_NAME']}"
NAMES = os.environ["NOX_HOSTS"].split(",")
HOSTS = [name for name in NAMES if not name.startswith("edge")]
BAD, LOST = HOSTS[-2:]
STATE = INVENTORY / ".state"  # hidden: Ansible reads every other file of an inventory's directory
BUNDLES = INVENTORY / ".bundles"
PLAIN = {"ANSIBLE_FORCE_COLOR": "0", "ANSIBLE_NOCOLOR": "1"}  # Molecule has colours, wherever they go
ENVIRONMENT = {**os.environ, **PLAIN, "NOX_STATE_DIR": str(STATE), "COLUMNS": "200"}

# Version → file of the service → what is added at its end.
STARTED = 'import sys\nif "--version" not in sys.argv:\n    '
RELEASES: dict[str, dict[str, str]] = {
    "0.2.0": {},
    "0.3.0": {"nox_api/__init__.py": 'raise SystemExit("this release is broken")\n'},
    "0.4.0": {
        "nox_api/__init__.py": "import os, threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(20), os._exit(3)), daemon=True).start()\n"
    },
    "0.5.0": {
        "nox_api/__init__.py": f"{STARTED}import socket\n"
        f'    if socket.gethostname() == "{BAD}":\n        raise SystemExit("this release is broken on this host")\n'
    },
    "0.6.0": {"nox_api/application.py": releases.SLOW},
    "0.7.0": {"nox_api/__init__.py": f'{STARTED}raise SystemExit("NOX_REGION is not set in /etc/default/nox-api")\n'},
    "0.8.0": {},
}

last = ""  # how the last rollout ended, for the table


def noxctl(*words: str, prefix: tuple[str, ...] = (), inventory: Path = INVENTORY) -> subprocess.CompletedProcess[str]:
    if "-i" not in words and words[0] not in ("bundle", "runs", "report"):
        words = (words[0], "-i", str(inventory), *words[1:])
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "noxctl", *words],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(f"$ noxctl {' '.join(words)}\n{done.stderr}{done.stdout}exit {done.returncode}", flush=True)
    return done


def remember(code: int) -> None:
    """For the table at the end: the exit code, and which hosts ended how."""
    global last
    by_state: dict[str, list[str]] = {}
    for host, state in journal_states().items():
        by_state.setdefault(state, []).append(host)
    parts = [f"{state}: {' '.join(hosts) if len(hosts) < 4 else len(hosts)}" for state, hosts in by_state.items()]
    last = f"exit {code}; {', '.join(parts)}"


def rollout(version: str, *words: str, **how: Any) -> tuple[int, dict[str, Any]]:
    done = noxctl("rollout", str(bundle(version)), "--yes", "--json", *words, **how)
    remember(done.returncode)
    return done.returncode, json.loads(done.stdout or "{}")


def states(result: dict[str, Any]) -> dict[str, str]:
    return {one["host"]: one["state"] for one in result["hosts"]}


def journal_states() -> dict[str, str]:
    """Host → state, of the last rollout."""
    journal = Journal(STATE / "journal.db")
    try:
        return {host: row["state"] for host, row in journal.hosts(journal.runs(verb="rollout", limit=1)[0].id).items()}
    finally:
        journal.close()


class Started:
    """A rollout at work, whose lines are read as they come."""

    def __init__(self, version: str, *words: str, inventory: Path = INVENTORY) -> None:
        self.words = ["rollout", str(bundle(version)), "-i", str(inventory), "--yes", *words]
        print(f"$ noxctl {' '.join(self.words)}", flush=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "noxctl", *self.words],
            cwd=ROOT, env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.text = ""

    def until(self, words: str) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            print(line, end="", flush=True)
            self.text += line
            if words in line:
                return
        raise AssertionError(f"{words!r} was never said")

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self) -> int:
        assert self.process.stdout
        for line in self.process.stdout:
            print(line, end="", flush=True)
            self.text += line
        code = self.process.wait()
        print(f"exit {code}", flush=True)
        remember(code)
        return code


@functools.cache
def bundle(version: str) -> Path:
    """Made from a copy of the service's sources, by the command an operator would use."""
    app, out = releases.tree(BUNDLES, version, RELEASES[version]), BUNDLES / f"{version}.bundle"
    assert noxctl("bundle", "--app", str(app), "--out", str(out), "--target", "3.11 x86_64").returncode == 0
    return out


# ── The hosts


def fleet() -> dict[str, dict[str, Any]]:
    done = noxctl("status", "--json")
    return {one["host"]: one for one in json.loads(done.stdout)}


def on(host: str, command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "lab", "ssh", "--lab", LAB, host, "--", command],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout


def machine(host: str) -> Host:
    found = load_lab(LAB)
    assert found
    return found.hosts[host]


def seen(host: str, path: str) -> Path:
    """A file of a host as this machine sees it, without asking the host."""
    return machine(host).root / path.lstrip("/")


def current(host: str) -> str:
    return os.readlink(seen(host, "/opt/nox/current")).rpartition("/")[2]


def when(condition: Callable[[], object]) -> None:
    """Return as soon as something is so."""
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.002)


def cable(host: str) -> str:
    """This machine's end of the host's network cable; a long name of one is only another name for it."""
    found = subprocess.run(["ip", "-j", "link", "show", f"vb-{machine(host).machine}"], capture_output=True, check=True)
    return str(json.loads(found.stdout)[0]["ifname"])


def link(host: str, state: str) -> None:
    subprocess.run(["ip", "link", "set", cable(host), state], check=True)


@contextmanager
def unplugged(host: str, *, at_once: bool = True) -> Iterator[Callable[[], None]]:
    """No network for a host; yields what cuts it. It has it again afterwards."""
    if at_once:
        link(host, "down")
    try:
        yield lambda: link(host, "down")
    finally:
        link(host, "up")
        when(lambda: on(host, "echo here").strip() == "here")


def power_off(host: str) -> None:
    """At once, as when somebody pulls the plug."""
    process.kill_group(process.group_of(machine(host)))


def power_on() -> None:
    """Whoever has none."""
    command = [sys.executable, "-m", "lab", "up", f"--lab={LAB}", f"--hosts={','.join(NAMES)}"]
    subprocess.run([*command, f"--inventory={INVENTORY}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def serving() -> list[str]:
    """The hosts behind the edge."""
    known = json.loads(on("edge1", "cat /var/lib/nox-edge.json"))
    return [host for host in known["hosts"] if host not in known["drained"]]


def check(wanted: dict[str, str], *, out: tuple[str, ...] = (), unproven: tuple[str, ...] = ()) -> None:
    """The end state of every host: its version, healthy, nothing half-done, behind the edge but for those in `out`. Those in
    `unproven` differ in one thing: their release hasn't passed its tests since it was switched to, and they say so."""
    found = fleet()
    assert {host: found[host]["version"] for host in wanted} == wanted
    for host in wanted:
        one = found[host]
        told = [f"release.unproven {one['release']}: never, not seen healthy"] if host in unproven else []
        assert one["healthy"] and one["findings"] == told and one["drift"] == ("drifted" if told else "clean"), one
        assert one["release"].startswith(wanted[host] + "-") and one["proven"] != bool(told), one
        left = [path.name for path in seen(host, "/opt/nox/releases").iterdir() if path.name.startswith(".")]
        assert not left, f"{host}: {left}"
    assert sorted(set(HOSTS) - set(serving())) == sorted(out)
