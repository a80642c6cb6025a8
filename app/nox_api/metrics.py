"""What happened since the start of the front, counted for Prometheus."""

from __future__ import annotations

import platform
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import Scope

from nox_api import __version__
from nox_api.history.recorder import Recorder
from nox_api.slots import Slots
from nox_runner.protocol import HealthReply, Language, Status

_RUN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600)
_REQUEST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 30)
_METHODS = frozenset(("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"))


class Metrics:
    """The counters. Their labels take no value that a client could invent."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._runs = Counter(
            "nox_runs", "Runs that ended, whatever became of them", ["language", "status"],
            registry=registry,
        )  # fmt: skip
        self._run_seconds = Histogram(
            "nox_run_duration_seconds", "From the start of the sandbox to its end", ["language"],
            buckets=_RUN_BUCKETS, registry=registry,
        )  # fmt: skip
        self._refused = Counter(
            "nox_runs_refused", "Runs that did not begin: queue_full (429), policy (403)",
            ["reason"], registry=registry,
        )  # fmt: skip
        self._requests = Counter(
            "nox_http_requests", "Answered requests; 499: the client left before the answer",
            ["method", "route", "status"], registry=registry,
        )  # fmt: skip
        self._request_seconds = Histogram(
            "nox_http_request_duration_seconds", "From a request's head to its answer's end",
            ["route"], buckets=_REQUEST_BUCKETS, registry=registry,
        )  # fmt: skip
        self._slots = Gauge("nox_slots", "Runs that may be under way", registry=registry)
        self._slots_used = Gauge("nox_slots_used", "Runs that are", registry=registry)
        self._queue = Gauge("nox_queue", "Runs that may wait for a slot", registry=registry)
        self._queue_used = Gauge("nox_queue_used", "Runs that do", registry=registry)
        self._up = Gauge("nox_runner_up", "1 if the runner answers and can run", registry=registry)
        self._sandbox = {
            name: Gauge(f"nox_sandbox_{name}", text, registry=registry)
            for name, text in (
                ("bytes", "What the sandbox holds"),
                ("files", "Files, directories and links in it"),
                ("quota_bytes", "The most it may hold"),
                ("quota_files", "The most there may be"),
            )
        }
        self._history_up = Gauge(
            "nox_history_up", "1 if runs are recorded, 0 if that fails, NaN if it is off",
            registry=registry,
        )  # fmt: skip
        self._history_bytes = Gauge(
            "nox_history_bytes", "What the history takes on disk", registry=registry
        )
        self._history = Counter(
            "nox_history_runs", "Runs that were recorded, and those that were not: dropped",
            ["outcome"], registry=registry,
        )  # fmt: skip
        self._history_told = {"recorded": 0, "dropped": 0}
        build = Gauge("nox_build_info", "Always 1", ["version", "python"], registry=registry)
        build.labels(__version__, platform.python_version()).set(1)
        # A series that appears with its first event hides that event from rate().
        for reason in ("queue_full", "policy"):
            self._refused.labels(reason)
        for outcome in self._history_told:
            self._history.labels(outcome)

    def run(
        self,
        language: Language,
        status: Status | Literal["cancelled"],
        duration_ms: int | None = None,
    ) -> None:
        """A run ended; cancelled: its client left, before or after it began."""
        self._runs.labels(language, status).inc()
        if duration_ms is not None:
            self._run_seconds.labels(language).observe(duration_ms / 1000)

    def refused(self, reason: Literal["queue_full", "policy"]) -> None:
        """A run did not begin."""
        self._refused.labels(reason).inc()

    def request(self, scope: Scope, status: int, seconds: float) -> None:
        """A request was answered. `none` is the route of what was refused before one was found."""
        method = scope["method"] if scope["method"] in _METHODS else "other"
        route = getattr(scope.get("route"), "path", "none")
        self._requests.labels(method, route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def exposition(self, slots: Slots, recorder: Recorder, runner: HealthReply | str) -> bytes:
        """All of it in Prometheus' text format, with what the others hold and count now."""
        self._slots.set(slots.total)
        self._slots_used.set(slots.used)
        self._queue.set(slots.queue)
        self._queue_used.set(slots.queued)
        self._history_up.set(not recorder.failed if recorder.on else float("nan"))
        self._history_bytes.set(recorder.bytes)
        for outcome, count in (("recorded", recorder.recorded), ("dropped", recorder.dropped)):
            # The recorder counts; a counter here can only be brought up to it.
            series = self._history.labels(outcome)
            series.inc(count - self._history_told[outcome])
            self._history_told[outcome] = count
        known = runner if isinstance(runner, HealthReply) else None
        self._up.set(known is not None and known.able)
        for name, gauge in self._sandbox.items():
            gauge.set(getattr(known.sandbox, name) if known else float("nan"))
        return generate_latest(self._registry)
