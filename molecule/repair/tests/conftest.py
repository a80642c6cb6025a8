"""The damaged hosts, the playbooks that mend them, and the table at the end.

Each of pytest-xdist's processes has a host of its own, so damages are done and mended side by side.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import testinfra

INVENTORY = Path(os.environ["NOX_INVENTORY"])
PROJECT = Path(os.environ["ANSIBLE_CONFIG"]).parent
# In the environment, so that all processes choose the same pairs.
SEED = int(os.environ.setdefault("NOX_MATRIX_SEED", str(random.SystemRandom().randrange(10**6))))
PAIRS = int(os.environ.get("NOX_MATRIX_PAIRS", "20"))
PART, PARTS = map(int, os.environ.get("NOX_MATRIX_PART", "1/1").split("/"))  # "2/4": the second fourth of all tests


@dataclass(frozen=True)
class Ran:
    """A playbook's outcome, as its own JSON report has it."""

    status: int
    report: dict[str, Any]
    seconds: float
    output: str

    @property
    def findings(self) -> set[str]:
        return {f"{one['id']} {one['what']}" for one in self.report["findings"]}


def ran(verb: str, name: str, scratch: Path, *command: str, more: tuple[str, ...] = ()) -> Ran:
    report = scratch / f"{verb}.json"
    report.unlink(missing_ok=True)
    begun = time.monotonic()
    words = ["-i", str(INVENTORY), "--limit", name, "-e", f"nox_{verb}_json={report}"]
    plain = {key: value for key, value in os.environ.items() if key != "ANSIBLE_FORCE_COLOR"}  # Molecule sets it
    done = subprocess.run(
        [*command, *words, *more], env={**plain, "ANSIBLE_NOCOLOR": "1"}, capture_output=True, text=True
    )
    seconds = time.monotonic() - begun
    output = done.stdout + done.stderr
    assert report.exists(), output
    return Ran(done.returncode, json.loads(report.read_text())[name], seconds, output)


@dataclass(frozen=True)
class Site:
    """One host and what can be done to it from here."""

    name: str
    scratch: Path

    def drift(self, *more: str) -> Ran:
        """As the wrapper ends it; `more` are further words, the last --limit counts."""
        program = (sys.executable, str(PROJECT / "playbooks/drift.py"))
        return ran("drift", self.name, self.scratch, *program, more=more)

    def repair(self) -> Ran:
        return ran("repair", self.name, self.scratch, "ansible-playbook", str(PROJECT / "playbooks/repair.yml"))

    def install(self) -> None:
        words = ["ansible-playbook", "-i", str(INVENTORY), "--limit", self.name]
        subprocess.run([*words, str(PROJECT / "playbooks/install.yml")], check=True, capture_output=True)

    def check(self) -> None:
        """Everything that is asked of a freshly installed host, in its short form."""
        tests = PROJECT / "molecule/shared/tests"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", str(tests)],
            env={**os.environ, "NOX_CHECK": "short", "NOX_CHECKED": self.name},
            cwd=self.scratch,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-5000:]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    number = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    return Site(f"nox{int(number) + 1}", tmp_path_factory.mktemp("reports"))


@pytest.fixture(scope="session")
def host(site: Site) -> Any:
    return testinfra.get_host(f"ansible://{site.name}?ansible_inventory={INVENTORY}")


def pytest_report_header() -> str:
    part = f"part {PART} of {PARTS} (NOX_MATRIX_PART), " if PARTS > 1 else ""
    return f"{part}random pairs: {PAIRS}, seed {SEED} (NOX_MATRIX_PAIRS, NOX_MATRIX_SEED)"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Every so-manieth test: each part has some of each kind."""
    chosen = items[PART - 1 :: PARTS]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table: what a test has noted with record_property, in the order in which it ended."""
    reports = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
    rows = [(not report.passed, *row) for report in reports for key, row in report.user_properties if key == "damage"]
    if not rows:
        return
    width = max(len(row[1]) for row in rows)
    write = terminalreporter.write_line
    write(f"\n{'damage':{width}}  seconds  what drift reported → what mended it")
    for failed, name, findings, by, seconds in sorted(rows, key=lambda row: row[5] if len(row) > 5 else 0):
        write(f"{name:{width}}  {seconds:7.1f}  {'FAILED ' if failed else ''}{findings} → {by}")
    times = sorted(row[4] for row in rows)
    part = f", part {PART} of {PARTS} (all: make matrix)" if PARTS > 1 else ""
    write(f"damages: {len(rows)}{part}; seed of the pairs {SEED}")
    write(f"damage to healthy, median: {times[len(times) // 2]:.1f} s, longest: {times[-1]:.1f} s")
