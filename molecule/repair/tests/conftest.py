"""The damaged host, the playbooks that mend it, and the table at the end."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

INVENTORY = Path(os.environ["NOX_INVENTORY"])
PROJECT = Path(os.environ["ANSIBLE_CONFIG"]).parent
SEED = int(os.environ.get("NOX_MATRIX_SEED", str(random.SystemRandom().randrange(10**6))))
PAIRS = int(os.environ.get("NOX_MATRIX_PAIRS", "10"))  # each takes about 15 s; 20 where there is time
ROWS: list[tuple[str, str, float]] = []


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


def play(verb: str, scratch: Path) -> Ran:
    """Runs one playbook against the host."""
    report = scratch / f"{verb}.json"
    report.unlink(missing_ok=True)
    begun = time.monotonic()
    command = [
        "ansible-playbook",
        "-i",
        str(INVENTORY),
        str(PROJECT / f"playbooks/{verb}.yml"),
        "-e",
        f"nox_{verb}_json={report}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.monotonic() - begun
    output = done.stdout + done.stderr
    assert report.exists(), output
    return Ran(done.returncode, json.loads(report.read_text())["nox1"], seconds, output)


def pytest_report_header() -> str:
    return f"random pairs: {PAIRS}, seed {SEED} (NOX_MATRIX_PAIRS, NOX_MATRIX_SEED)"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not ROWS:
        return
    width = max(len(name) for name, _, _ in ROWS)
    terminalreporter.write_line(f"\n{'damage':{width}}  seconds  findings   (random pairs: seed {SEED})")
    for name, findings, seconds in ROWS:
        terminalreporter.write_line(f"{name:{width}}  {seconds:7.1f}  {findings}")
    times = sorted(seconds for _, _, seconds in ROWS)
    terminalreporter.write_line(
        f"damage to healthy, median: {times[len(times) // 2]:.1f} s, longest: {times[-1]:.1f} s"
    )


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports")
