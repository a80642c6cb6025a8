# SPDX-License-Identifier: Apache-2.0
"""The table at the end of drift and repair: per host what was found, what became of it, how long it took."""

from __future__ import annotations

DOCUMENTATION = r"""
name: nox_report
type: aggregate
short_description: A table of what M(nox.platform.nox_state) found and repair mended
description:
  - Listens to the results of M(nox.platform.nox_state) and prints one table when the playbook ends. Costs no task.
  - With C(-e nox_drift_json=FILE) or C(-e nox_repair_json=FILE) writes the same as JSON, on the control side.
author: The Nox maintainers
requirements:
  - enabled in ansible.cfg, C(callbacks_enabled = nox.platform.nox_report)
"""

import dataclasses
import json
import os
import re
import time
from pathlib import Path
from typing import Any

from ansible.plugins.callback import CallbackBase

PLAYBOOKS = {"drift.yml": "nox_drift_json", "repair.yml": "nox_repair_json"}
MODULES = ("nox.platform.nox_state", "nox_state")


@dataclasses.dataclass
class Host:
    """What is known of one host so far."""

    verdict: str = "unknown"
    findings: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    left: list[dict[str, Any]] | None = None
    aside: list[dict[str, str]] = dataclasses.field(default_factory=list)
    by: list[str] = dataclasses.field(default_factory=list)
    since: float = 0.0
    seconds: float = 0.0
    error: str = ""


def key(finding: dict[str, Any]) -> tuple[str, str]:
    return str(finding["id"]), str(finding["what"])


def outcome(host: Host, repairing: bool) -> str:
    """One word for a host: clean, drifted, unreachable, not installed; in a repair also mended, left, failed."""
    if host.verdict == "absent":
        return "not installed"
    if host.verdict != "drifted" or not repairing:
        return host.verdict
    if host.left is None:
        return "failed"
    return "left" if host.left else "mended"


def remedies(found: dict[str, Any]) -> list[str]:
    """What a repair does about a check's result: attributes, roles, and units that are started, restarted or reloaded."""
    words = [*(["owners and modes"] if found["set_right"] else []), *found["owners"]]
    for verb, units in (("start", found["down"]), ("restart", found["stale"]), ("reload", found["stale_proxy"])):
        words += [f"{verb} {unit}" for unit in units]
    return words


def without_python(result: dict[str, Any]) -> bool:
    """Whether a task failed because the host has no interpreter where Ansible looks for it."""
    said = f"{result.get('module_stderr', '')}{result.get('module_stdout', '')}{result.get('msg', '')}"
    return bool(re.search(r"/python3[.0-9]*: (No such file|not found|cannot execute)", said))


PYTHON_GONE = {
    "id": "host.python",
    "owner": "all",
    "what": "/usr/bin/python3",
    "expected": "the system's interpreter",
    "found": "nothing that runs",
    "severity": "fail",
    "since": "",
}


def rows(name: str, host: Host, repairing: bool) -> list[tuple[str, ...]]:
    """Table rows of one host: one per finding, the host's name on the first."""
    word = outcome(host, repairing)
    seconds = f"{host.seconds:.1f}"
    if not host.findings:
        return [(name, word, seconds, "", host.error)]
    left = {key(one) for one in host.left} if host.left is not None else None
    found: list[tuple[str, ...]] = []
    for finding in host.findings:
        state = "" if not repairing else "mended" if left is not None and key(finding) not in left else "left"
        text = (
            f"{finding['severity']:4} {finding['id']} {finding['what']}: {finding['found']}, not {finding['expected']}"
        )
        text += f", since {finding['since']}" if finding.get("since") else ""
        text += " (yours to decide)" if finding["owner"] == "operator" else ""
        found.append((name if not found else "", word if not found else "", seconds if not found else "", state, text))
    if host.left:
        known = {key(one) for one in host.findings}
        new = [one for one in host.left if key(one) not in known]
        found += [("", "", "", "new", f"{one['severity']:4} {one['id']} {one['what']}: {one['found']}") for one in new]
    if repairing and host.by:
        found.append(("", "", "", "by", ", ".join(host.by)))
    found += [("", "", "", "kept", f"{one['what']} in {one['to']}") for one in host.aside]
    if host.error:
        found.append(("", "", "", "error", host.error))
    return found


def table(hosts: dict[str, Host], repairing: bool) -> str:
    """The whole table as text; without colour, so that it reads the same in a file."""
    lines: list[tuple[str, ...]] = [("host", "state", "seconds", "", "findings")]
    for name in sorted(hosts):
        lines += rows(name, hosts[name], repairing)
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[4]]).rstrip()
        for line in lines
    )


class CallbackModule(CallbackBase):  # type: ignore[misc]
    """Collects, and prints once."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "nox.platform.nox_report"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        self.hosts: dict[str, Host] = {}
        self.playbook = ""
        self.json = ""

    def v2_playbook_on_start(self, playbook: Any) -> None:
        self.playbook = Path(str(playbook._file_name)).name

    def v2_playbook_on_play_start(self, play: Any) -> None:
        name = PLAYBOOKS.get(self.playbook, "")
        self.json = self.json or str(play.get_variable_manager().extra_vars.get(name, ""))

    def v2_playbook_on_task_start(self, task: Any, is_conditional: bool) -> None:
        self.task_since = time.monotonic()

    def v2_runner_on_ok(self, result: Any) -> None:
        if self.playbook not in PLAYBOOKS or result._task.action not in MODULES:
            return
        found = result._result
        name = result._host.get_name()
        if name not in self.hosts or self.hosts[name].verdict == "unknown":
            before = self.hosts.get(name, Host(since=self.task_since))  # it had no Python at the first try
            findings = before.findings + found["findings"]
            verdict = "drifted" if before.findings else found["verdict"]
            self.hosts[name] = Host(verdict, findings, since=before.since)
            self.hosts[name].by = ["link /usr/bin/python3"] * bool(before.findings) + remedies(found)
            if before.findings and found["verdict"] == "clean":
                self.hosts[name].left = []
        elif "aside" in found:
            self.hosts[name].aside = found["aside"]
        else:
            self.hosts[name].left = found["findings"]
        self.hosts[name].seconds = time.monotonic() - self.hosts[name].since

    def v2_runner_on_unreachable(self, result: Any) -> None:
        self.hosts.setdefault(result._host.get_name(), Host()).verdict = "unreachable"

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        name = result._host.get_name()
        if name not in self.hosts and without_python(result._result):
            verdict = "drifted" if self.playbook == "drift.yml" else "unknown"
            self.hosts[name] = Host(verdict, [PYTHON_GONE], since=self.task_since)
            return
        host = self.hosts.setdefault(name, Host("failed"))
        if host.verdict == "failed" and host.error:
            return  # of the check itself: what was tried after it says less
        if host.verdict == "failed" or (
            host.left is None and host.verdict != "absent" and self.playbook == "repair.yml"
        ):
            message, trace = (str(result._result.get(key, "")).strip() for key in ("msg", "module_stderr"))
            said = [*message.splitlines()[:1], *trace.splitlines()[-1:]]
            host.error = f"{result._task.get_name()}: {'; '.join(said) or 'no message'}"
            host.seconds = time.monotonic() - host.since if host.since else 0.0

    def v2_playbook_on_stats(self, stats: Any) -> None:
        if self.playbook not in PLAYBOOKS or not self.hosts:
            return
        repairing = self.playbook == "repair.yml"
        self._display.display(f"\n{table(self.hosts, repairing)}\n")
        if self.json or os.environ.get("NOX_REPORT_JSON"):  # the latter: drift.py's
            document = {
                name: {
                    "state": outcome(host, repairing),
                    "seconds": round(host.seconds, 2),
                    "findings": host.findings,
                    "left": host.left or [],
                    "by": host.by,
                    "aside": host.aside,
                    "error": host.error,
                }
                for name, host in sorted(self.hosts.items())
            }
            for path in filter(None, (self.json, os.environ.get("NOX_REPORT_JSON"))):
                Path(path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
