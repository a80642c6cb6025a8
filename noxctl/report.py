"""One HTML file about one run; it needs no network, and holds nothing that the journal doesn't."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from noxctl.journal import DONE, Journal, Run
from noxctl.view import printable, span

TEMPLATE = Path(__file__).with_name("report.html.j2")
LABEL = 150  # SVG units for host names, left of the bars
WIDTH = 1000
ROW = 22
SLOWEST = 10
# A step shorter than this is drawn this wide, so that it can be seen and pointed at.
NARROWEST = 1.5


def page(journal: Journal, run: Run) -> str:
    """The whole page as text."""
    hosts, steps, waves = journal.hosts(run.id), journal.steps(run.id), journal.waves(run.id)
    ended = run.ended or max([run.started, *(step["started"] + step["seconds"] for step in steps)])
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        clock=clock,
        span=lambda seconds: "" if seconds is None else span(seconds),
        printable=lambda text: printable(str(text)),
    )
    return environment.get_template(TEMPLATE.name).render(
        run=run,
        ended=ended,
        hosts=hosts,
        waves=waves,
        notes=journal.notes(run.id),
        good=sum(row["state"] in DONE for row in hosts.values()),
        timeline=timeline(run.started, ended, hosts, steps, waves),
        slowest=slowest(steps),
        drifted={host: row["before"]["findings"] for host, row in hosts.items() if row["before"].get("findings")},
        failures={host: row for host, row in hosts.items() if row["error"]},
        label=LABEL,
        width=WIDTH,
        row=ROW,
    )


def timeline(
    start: float, end: float, hosts: dict[str, Any], steps: list[dict[str, Any]], waves: list[dict[str, Any]]
) -> dict[str, Any]:
    """Bars, wave bands and ticks in SVG units; a row per host, in the order of the waves."""
    scale = (WIDTH - LABEL - 10) / max(1.0, end - start)

    def x(at: float) -> float:
        return round(LABEL + (at - start) * scale, 1)

    order = {host: number for number, host in enumerate(hosts)}
    bars = [
        {
            "x": x(step["started"]), "y": order[step["host"]] * ROW + 4,
            "width": round(max(NARROWEST, step["seconds"] * scale - 0.5), 1), "kind": step["outcome"],
            "title": f"{step['host']}: {step['task']}, {step['seconds']:.1f} s, {step['outcome']}",
        }
        for step in steps
        if step["host"] in order
    ]  # fmt: skip
    bands = [
        {"x": x(wave["started"]), "width": max(2.0, round(x(wave["ended"] or end) - x(wave["started"]), 1)), "name": wave["name"]}
        for wave in waves
        if wave["started"]
    ]  # fmt: skip
    unit = next((u for u in (1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600) if (end - start) / u <= 10), 7200)
    ticks = [{"x": x(start + at), "text": span(at)} for at in range(0, int(end - start) + 1, unit)]
    labels = [{"y": number * ROW + 15, "host": host, "state": hosts[host]["state"]} for host, number in order.items()]
    return {"bars": bars, "bands": bands, "ticks": ticks, "labels": labels, "height": len(hosts) * ROW}


def slowest(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tasks that took longest on one host, with the number of hosts and the median."""
    tasks: dict[str, list[tuple[float, str]]] = {}
    for step in steps:
        tasks.setdefault(step["task"], []).append((step["seconds"], step["host"]))
    rows: list[dict[str, Any]] = []
    for task, found in tasks.items():
        found.sort()
        most, host = found[-1]
        rows.append(
            {"task": task, "most": most, "host": host, "count": len(found), "median": found[len(found) // 2][0]}
        )
    return sorted(rows, key=lambda row: -row["most"])[:SLOWEST]


def clock(at: float | None) -> str:
    """A time of day, in the reader's zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) if at else ""
