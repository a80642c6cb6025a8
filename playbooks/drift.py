#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs drift.yml and ends with a status that tells what was found, which ansible-playbook alone can't.

    playbooks/drift.py -i inventory/yours [--limit …] [-e nox_drift_json=FILE] [anything ansible-playbook takes]

Exit status, the first that applies:
    4  a host was unreachable: what is known is not all
    1  a host's check ended with an error, or none was asked
    2  a host has drifted
    3  Nox isn't installed on a host
    0  all hosts are clean
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CLEAN, ERROR, DRIFTED, NOT_INSTALLED, UNREACHABLE = 0, 1, 2, 3, 4
STATUS = {"unreachable": UNREACHABLE, "drifted": DRIFTED, "not installed": NOT_INSTALLED, "clean": CLEAN}
ORDER = (UNREACHABLE, ERROR, DRIFTED, NOT_INSTALLED, CLEAN)


def exit_status(states: list[str]) -> int:
    """One status for all hosts' states."""
    found = {STATUS.get(state, ERROR) for state in states} or {ERROR}
    return next(status for status in ORDER if status in found)


def main(arguments: list[str]) -> int:
    beside = Path(sys.executable).with_name("ansible-playbook")
    command = [str(beside) if beside.exists() else "ansible-playbook", str(Path(__file__).with_name("drift.yml"))]
    with tempfile.TemporaryDirectory(prefix="nox-drift-") as place:
        report = Path(place) / "drift.json"
        done = subprocess.run(
            [*command, *arguments], env={**os.environ, "NOX_REPORT_JSON": str(report)}, stdin=subprocess.DEVNULL
        )
        if not report.exists():
            return done.returncode or ERROR  # usage, syntax: ansible-playbook has said what
        return exit_status([host["state"] for host in json.loads(report.read_text(encoding="utf-8")).values()])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
