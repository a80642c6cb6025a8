"""``make bench``: every figure of docs/performance.md, from one run.

    python -m tests.bench [--part NAME]… [--no-lab] [--count N] [--seconds S] [--runs N] [--flood-seconds S]

Writes bench.json; then the table and the plots of docs/performance.md from it, those parts that were measured. Without
--no-lab a lab host is made, so that there are figures through Caddy with TLS; where that is not possible it says so. A
part alone is quick; all take about five minutes on a quiet machine with two cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.bench import plot
from tests.hostile import lab as hostile_lab
from tests.run import CannotRunHere, app_libraries, app_python, reachable, require_package, test_home

ROOT = Path(__file__).resolve().parents[2]
JSON = ROOT / "bench.json"
DOCUMENT = ROOT / "docs/performance.md"
BEGIN, END = "<!-- figures: make bench -->", "<!-- end of figures -->"
PARTS = ("latency", "throughput", "cpu", "preimport", "memory", "endurance", "flood")
_PYTHON = "3.11"


def main() -> int:
    options, rest = arguments()
    parts = options.part or PARTS
    try:
        require_package("bwrap", "bubblewrap")
    except CannotRunHere as reason:
        print(reason, file=sys.stderr)
        return 1
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=test_home())))
        place.chmod(0o755)
        app = ROOT / "app"
        if os.geteuid() == 0 and not reachable(app / "pyproject.toml"):
            app = shutil.copytree(app, place / "app")
        command = [str(app_python(_PYTHON)), "-B", str(ROOT / "tests/bench/measure.py"), "--app", str(app)]
        command += ["--json", str(JSON), *rest, *(word for part in parts for word in ("--part", part))]
        if not options.no_lab and {"latency", "throughput"} & set(parts):
            command += through_caddy(stack, place, options.lab)
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **app_libraries(_PYTHON)}, check=False)
    if done.returncode != 0:
        return 1
    figures = json.loads(JSON.read_text())
    figures["machine"] = machine()
    figures["command"] = " ".join(["python -m tests.bench", *sys.argv[1:]])
    JSON.write_text(json.dumps(figures, indent=1) + "\n")
    text = table(figures)
    print(text)
    before, _, after = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{text}\n{END}{after.partition(END)[2]}")
    for name, content in plot.plots(figures).items():
        (DOCUMENT.parent / name).write_text(content)
    return 0


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """The own options, and those that are measure.py's."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--no-lab", action="store_true")
    parser.add_argument("--lab", default="bench", help="name of the lab that is made")
    return parser.parse_known_args()


def through_caddy(stack: ExitStack, place: Path, lab: str) -> list[str]:
    """Options for a Nox that is installed on a lab host; none, with the reason printed, where that cannot be."""
    inventory = place / "inventory"
    try:
        url, token, ca = stack.enter_context(hostile_lab.installed(lab, inventory, {"nox_backend": "zygote"}))
    except hostile_lab.NotPossibleError as reason:
        print(f"no figures through Caddy: {reason}", file=sys.stderr)
        return []
    return ["--url", url, "--token-file", str(token), "--ca", str(ca)]


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    load = os.getloadavg()[1]
    day = datetime.datetime.now(datetime.timezone.utc).date()
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), {memory:.0f} GiB, Linux {platform.release().split('-')[0]}, "
        f"load {load:.1f} over the last five minutes, {day}"
    )


def table(figures: dict[str, Any]) -> str:
    """The figures as Markdown, each beside what the design asks for."""
    rows = ["| what | figure | beside | ratio | wanted |", "|---|---|---|---|---|"]

    def row(what: str, value: float, unit: str, beside: str, base: float, wanted: str) -> None:
        rows.append(f"| {what} | {value:.2f} {unit} | {beside} {base:.2f} | **{value / base:.2f} x** | {wanted} |")

    latency = figures.get("latency", {})
    for name, what, wanted in (
        ("zygote", "hello `/run_py`, zygote, HTTP, p50", "≤ 0.20 x"),
        ("tls", "the same through Caddy with TLS", "≤ 0.30 x"),
        ("bubblewrap", "hello `/run_py`, bubblewrap, HTTP, p50", ""),
    ):
        if name in latency:
            row(what, latency[name]["p50_ms"], "ms", "bare `python3 -c`", latency["bare"]["p50_ms"], wanted)
    if "bubblewrap" in latency and "bwrap" in latency:
        base = latency["bwrap"]["p50_ms"]
        row("the same beside bwrap", latency["bubblewrap"]["p50_ms"], "ms", "bwrap's command line", base, "≤ 1.1 x")
    for name in ("zygote", "bubblewrap"):
        if name in latency:
            base = latency["bare_sh"]["p50_ms"]
            wanted = "≤ 6 x" if name == "zygote" else ""
            row(f"`/run_sh` echo, {name}, p50", latency[f"{name}_sh"]["p50_ms"], "ms", "bare `sh -c`", base, wanted)
    throughput = figures.get("throughput", {})
    for name, what in (("zygote", "zygote"), ("tls", "zygote through Caddy with TLS"), ("bubblewrap", "bubblewrap")):
        if name in throughput:
            wanted = "≥ 2 x" if name == "zygote" else ""
            row(f"8 clients, {what}", throughput[name], "runs/s", "bare starts/s", throughput["bare"], wanted)
    if found := figures.get("cpu"):
        row("CPU of a run, 8 clients, zygote", found["all"], "ms", "bare `python3 -c`", found["bare"], "")
        own = {name: found[name] for name in ("front", "runner", "client")}
        what = f"of it the sandbox, beside {', '.join(f'{name} {value:.1f}' for name, value in own.items())}"
        row(what, found["all"] - sum(own.values()), "ms", "a fork of Python into namespaces", found["forks"], "")
    if found := figures.get("preimport"):
        base = found["without"]["p50_ms"]
        row(
            "a program with heavy imports, preimported, p50", found["with"]["p50_ms"], "ms", "not preimported", base, ""
        )
        row("the same", found["with"]["p50_ms"], "ms", "bare `python3 -c`", found["bare"]["p50_ms"], "")
    for name, found in figures.get("memory", {}).items():
        rows.append(
            f"| idle memory, {name}: front {found['front']} and runner {found['runner']} MiB | {found['both']} MiB"
            f" | its sandboxes in waiting: {found['ready']:.1f} MiB | | ≤ 90 MB |"
        )
    if found := figures.get("endurance"):
        last, first = found["last"]["p99_ms"], found["first"]["p99_ms"]
        row(f"{found['runs']} runs in a row, p99 of the last 1000", last, "ms", "of the first 1000", first, "≤ 1.1 x")
        for name, before in found["before"].items():
            rows.append(f"| after them: {name} | {found['after'][name]:g} | before {before:g} | | no growth |")
    if found := figures.get("flood"):
        most = [max(pair[index] for pair in found["line"]) for index in (0, 1)]
        what = f"{found['runs']} runs that print without end, in {found['seconds']:g} s: most memory"
        rows.append(f"| {what} | front {most[0]} MiB, runner {most[1]} MiB | | | flat |")
    return f"`{figures['command']}` on {figures['machine']}:\n\n" + "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
