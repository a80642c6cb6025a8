# SPDX-License-Identifier: Apache-2.0
"""What a fleet's table shows of one host: release, health, certificate, counters."""

from __future__ import annotations

import calendar
import json
import os
import re
import socket
import ssl
import time
from pathlib import Path
from typing import Any

from . import host_state, units
from .local_api import CONFIG, Unanswered, call
from .release_files import read_manifest

UNITS = ("nox-api.service", "nox-runner.service")
SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? ([0-9.e+-]+)$")
# SEQUENCE of UTCTime (17 0d) or GeneralizedTime (18 0f), twice
VALIDITY = re.compile(
    rb"\x30[\x1e-\x22](?:\x17\x0d\d{12}Z|\x18\x0f\d{14}Z)(?:\x17\x0d(\d{12})Z|\x18\x0f(\d{14})Z)", re.DOTALL
)
# What the table of requests leaves out: a health check's latency says nothing about clients.
OWN_ROUTES = ('route="/health"', 'route="/metrics"')


def releases() -> dict[str, Any]:
    """The current release and what the manifest says of it."""
    try:
        current = Path(os.readlink(host_state.ROOT / "current")).name
    except OSError:
        current = ""
    entries = read_manifest(host_state.MANIFEST)
    mine: dict[str, Any] = next((one for one in reversed(entries) if one.get("release") == current), {})
    healthy = next((one["release"] for one in reversed(entries) if one.get("healthy") and not one.get("failed")), "")
    return {
        "release": current,
        "version": current.rpartition("-")[0],
        "release_since": mine.get("since", ""),
        "last_healthy": healthy,
        # whether it passed its tests since it was switched to
        "proven": bool(entries) and entries[-1] == mine and bool(mine.get("healthy")) and not mine.get("failed"),
    }


def counters(text: str) -> dict[str, float]:
    """Requests of clients, those answered with 5xx (a refused 503 included), and the seconds they took together."""
    found = {"requests": 0.0, "server_errors": 0.0, "request_seconds": 0.0}
    for line in text.splitlines():
        match = SAMPLE.match(line)
        if not match or any(route in (match[2] or "") for route in OWN_ROUTES):
            continue
        if match[1] == "nox_http_requests_total":
            found["requests"] += float(match[3])
            if 'status="5' in match[2]:
                found["server_errors"] += float(match[3])
        elif match[1] == "nox_http_request_duration_seconds_sum":
            found["request_seconds"] += float(match[3])
    return found


def certificate_days(url: str) -> float | None:
    """Days until the certificate that is really served ends; None where none is served."""
    name = re.sub(r"^https?://|[\[\]]|/.*$", "", url)
    # only its end is asked for; whether clients trust it, the check and the smoke tests ask
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with (
            socket.create_connection(("127.0.0.1", 443), 5) as plain,
            context.wrap_socket(plain, server_hostname=name or "localhost") as wrapped,
        ):
            served = wrapped.getpeercert(binary_form=True) or b""
    except OSError:
        return None
    end = end_of(served)
    return round((end - time.time()) / 86400, 2) if end else None


def end_of(certificate: bytes) -> float | None:
    """When a certificate (X.509, DER) ends, seconds since the epoch: the second of the two times that follow each other in it.

    Python reads only one that it has verified, and openssl's command line takes as long as the rest of a status.
    """
    found = VALIDITY.search(certificate)
    if not found:
        return None
    digits = (found[1] or found[2]).decode("ascii")
    # two digits of a year are of 1950 to 2049 (RFC 5280, 4.1.2.5.1)
    year, rest = (digits[:4], digits[4:]) if found[2] else (f"{20 if digits < '5' else 19}{digits[:2]}", digits[2:])
    return float(calendar.timegm(time.strptime(year + rest, "%Y%m%d%H%M%S")))


def median_run(count: int) -> float | None:
    """Milliseconds of the median of some runs that do nothing; None where one doesn't go well."""
    times = []
    for _ in range(count):
        begun = time.monotonic()
        status, answer = call("POST", "/run_py", {"code": "pass"}, seconds=60.0)
        if status != 200 or json.loads(answer).get("status") != "ok":
            return None
        times.append((time.monotonic() - begun) * 1000)
    return round(sorted(times)[len(times) // 2], 1) if times else None


def look(probe: int, about: dict[str, Any]) -> dict[str, Any]:
    """What nox_status says of the host itself; `about` as it is recorded."""
    found: dict[str, Any] = {"installed": CONFIG.exists() and (host_state.ROOT / "current").is_symlink(), **releases()}
    states = units.show(list(UNITS))
    problems = [
        f"{name} is {values.get('ActiveState')} ({values.get('SubState')})"
        for name, values in states.items()
        if values.get("ActiveState") != "active"
    ]
    found["restarts"] = {name: int(values.get("NRestarts") or 0) for name, values in states.items()}
    found.update(counters(""))
    found["probe_ms"] = None
    try:
        status, answer = call("GET", "/health")
        health = json.loads(answer)
        if status != 200 or health.get("status") != "ok":
            problems.append(f"/health says {status} {health.get('status') or health.get('detail', '')}".strip())
        # what answers, which isn't what the link points to before a restart
        found["version"] = health.get("version") or found["version"]
        status, answer = call("GET", "/metrics")
        if status == 200:
            found.update(counters(answer.decode(errors="replace")))
        found["probe_ms"] = median_run(probe)
        if probe and found["probe_ms"] is None:
            problems.append("a program that does nothing doesn't end well")
    except (Unanswered, ValueError) as error:
        problems.append(f"the API doesn't answer: {error}")
    if not found["installed"]:
        problems = ["Nox is not installed"]
    found["healthy"], found["problem"] = not problems, "; ".join(problems)
    written = host_state.modified(host_state.RECORD)
    found["last_run"] = host_state.text_of(written) if written else ""
    found["token_age_days"] = round((time.time() - CONFIG.stat().st_mtime) / 86400, 2) if CONFIG.exists() else None
    proxied = found["installed"] and about.get("proxy", "none") != "none"
    found["certificate_days"] = certificate_days(about.get("url", "")) if proxied else None
    return found


def answer(options: dict[str, Any]) -> dict[str, Any]:
    """What nox_status returns, what nox_state does among it; of its options, `probe`."""
    begun = time.monotonic()
    compared = host_state.answer_of(*host_state.look(Path(host_state.RECORD)))
    seconds = round(time.monotonic() - begun, 3)
    return {**compared, "seconds": seconds, "status": look(options["probe"], compared["about"])}
