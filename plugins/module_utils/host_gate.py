# SPDX-License-Identifier: Apache-2.0
"""What a host must show before its release counts as healthy: services that stay up, and the smoke tests. What nox_gate does."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO, Any

from . import releases
from .commands import ENVIRONMENT
from .units import last_words, show

SMOKE = "/usr/local/share/nox/tests/smoke.sh"
# The tests begin so long before the end of the watch, and take about as long: what breaks only after a while has broken by then.
LEAD = 2.0
LOOK_SECONDS = 0.1
LONGEST = 300.0  # seconds after the watch; each request of the tests gives up by itself after 30


class Refused(Exception):
    """The host doesn't pass; the message says what it showed."""


def begin(url: str, ca: str, output: IO[str]) -> subprocess.Popen[bytes]:
    """The smoke tests, as the leader of a process group of their own. They read the token from the host's configuration."""
    return subprocess.Popen(
        ["bash", SMOKE],
        env={**ENVIRONMENT, "NOX_URL": url, "NOX_CA": ca},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def end(tests: subprocess.Popen[bytes]) -> None:
    """Ends tests that are of no interest any more; they have ten seconds to tidy up."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(tests.pid, number)
            tests.wait(timeout=10)
            return


def states(units: list[str]) -> dict[str, str]:
    """Unit → main process, 0 for what has none. Raises Refused for one that isn't up."""
    shown = show(units) if units else {}
    for name in units:
        found = shown.get(name, {})
        if found.get("ActiveState") not in ("active", "reloading"):
            told = (
                f"{name} is {found.get('ActiveState', 'unknown')} ({found.get('SubState', 'systemd does not answer')})"
            )
            raise Refused(f"{told}\n{last_words([name])}")
    return {name: shown[name].get("MainPID", "0") for name in units}


def alive(pid: str) -> bool:
    """Whether a unit's main process runs; a unit that has none lives without."""
    return pid == "0" or Path("/proc", pid).exists()


def failures(report: str) -> str:
    """The failed tests with their reasons, which stand below them; all of it where none says why."""
    lines = [line.strip() for line in report.splitlines() if line.startswith(("FAIL", " " * 17))]
    return "; ".join(lines) or report.strip()


def watch(options: dict[str, Any]) -> str:
    """What the smoke tests printed, on a host that passes. Raises Refused."""
    first = states(options["units"])
    over = time.monotonic() + options["seconds"]
    tests = None
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        try:
            while tests is None or tests.poll() is None or time.monotonic() < over:
                if tests is None and time.monotonic() >= over - LEAD:
                    tests = begin(options["url"], options["ca"], output)
                if tests and tests.poll():
                    break
                if not all(alive(pid) for pid in first.values()):
                    time.sleep(3 * LOOK_SECONDS)  # until systemd has noticed, and the journal has it
                    break
                if time.monotonic() > over + LONGEST:
                    raise Refused(f"The smoke tests don't end: {SMOKE}")
                time.sleep(LOOK_SECONDS)
            last = states(options["units"])
            if changed := [name for name, pid in first.items() if last[name] != pid or not alive(pid)]:
                raise Refused(f"{changed[0]} was restarted while it was watched\n{last_words(changed)}")
        finally:
            if tests and tests.poll() is None:
                end(tests)
        output.seek(0)
        report = output.read()
    if tests is None or tests.returncode != 0:
        raise Refused(f"The smoke tests failed: {failures(report)}")
    return report


def answer(options: dict[str, Any]) -> dict[str, Any]:
    """What nox_gate returns; `options` are its own, checked, and check_mode, which tests nothing."""
    report = ""
    if not options["check_mode"]:
        try:
            report = watch(options)
        except Refused as why:
            return {"failed": True, "msg": str(why)}
    if not options["release"]:
        return {"changed": False, "report": report.splitlines()}
    healthy = {name: options[name] for name in ("root", "record", "check_mode")}
    judged = releases.answer(
        {**healthy, "id": options["release"], "state": "healthy", "sha256": None, "archive": None, "keep": 0}
    )
    return {**judged, "report": report.splitlines()}
