"""How long a hello world takes through Nox, beside a bare, unsandboxed python3.

    latency.py [--backend zygote]                        a service of its own, on loopback
    latency.py --url https://host --token-file F [--ca F]   an installed one

Both sides are measured in turns, so that whatever else the machine does weighs on both alike;
the ratios are what counts. `--json FILE` keeps the figures.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import ssl
import statistics
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_APP = Path(__file__).resolve().parents[2] / "app"
_BARE = ["/usr/bin/python3", "-c", "print(1)"]
_BARE_SHELL = ["/bin/sh", "-c", "echo 1"]


@dataclass(frozen=True)
class Target:
    url: str
    token: str
    ca: str | None = None

    def connect(self) -> http.client.HTTPConnection:
        parts = urllib.parse.urlsplit(self.url)
        host = parts.hostname or "127.0.0.1"
        if parts.scheme == "https":
            context = ssl.create_default_context(cafile=self.ca)
            return http.client.HTTPSConnection(host, parts.port, timeout=30, context=context)
        return http.client.HTTPConnection(host, parts.port, timeout=30)


def request(target: Target, connection: http.client.HTTPConnection, path: str, body: bytes) -> int:
    """One run; its HTTP status. A run that did not print 1 is an error."""
    headers = {"Authorization": f"Bearer {target.token}", "Content-Type": "application/json"}
    connection.request("POST", path, body, headers)
    response = connection.getresponse()
    content = response.read()
    if response.status == 200 and json.loads(content)["stdout"] != "1\n":
        raise SystemExit(f"a run went wrong: {content.decode()}")
    return response.status


def bare(command: list[str]) -> None:
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env={}, check=True)


def interleaved(actions: dict[str, Callable[[], object]], count: int, gap: float) -> dict[str, list[float]]:
    """Milliseconds of each action, `count` times, `gap` seconds of rest before each."""
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for name, action in [*actions.items()] * (count + 3):
        time.sleep(gap)
        started = time.perf_counter()
        action()
        taken[name].append((time.perf_counter() - started) * 1000)
    return {name: values[3:] for name, values in taken.items()}


def rate(action: Callable[[], bool], seconds: float) -> float:
    """How many times per second `action` succeeds in one thread."""
    done, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        done += action()
    return done / spent


def parallel(make: Callable[[], Callable[[], bool]], clients: int, seconds: float) -> float:
    """Successes per second of `clients` threads together."""
    rates: list[float] = []
    threads = [threading.Thread(target=lambda: rates.append(rate(make(), seconds))) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(rates)


def client(target: Target, path: str, body: bytes) -> Callable[[], bool]:
    connection = target.connect()
    return lambda: request(target, connection, path, body) == 200


def bare_client() -> bool:
    bare(_BARE)
    return True


def measure(target: Target, count: int, seconds: float) -> dict[str, float]:
    python, shell = json.dumps({"code": "print(1)"}).encode(), json.dumps({"cmd": "echo 1"}).encode()
    taken = interleaved(
        {
            "bare": lambda: bare(_BARE),
            "nox": client(target, "/run_py", python),
            "bare_sh": lambda: bare(_BARE_SHELL),
            "nox_sh": client(target, "/run_sh", shell),
        },
        count,
        0.02,
    )
    figures = {}
    for name, values in taken.items():
        cuts = statistics.quantiles(values, n=100)
        figures[f"{name}_p50_ms"], figures[f"{name}_p95_ms"] = cuts[49], cuts[94]
    rounds = 3
    for _ in range(rounds):  # in turns too
        for name, make in (
            ("bare", lambda: bare_client),
            ("nox", lambda: client(target, "/run_py", python)),
        ):
            key = f"{name}_8_clients_per_s"
            figures[key] = figures.get(key, 0.0) + parallel(make, 8, seconds / rounds) / rounds
    figures["p50_ratio"] = figures["nox_p50_ms"] / figures["bare_p50_ms"]
    figures["sh_p50_ratio"] = figures["nox_sh_p50_ms"] / figures["bare_sh_p50_ms"]
    figures["throughput_ratio"] = figures["nox_8_clients_per_s"] / figures["bare_8_clients_per_s"]
    return figures


@contextmanager
def own_service(backend: str) -> Iterator[Target]:
    """A front and a runner of this checkout; needs the service's dependencies in this Python."""
    sys.path[:0] = [str(_APP / "tests"), str(_APP)]
    from service import Service  # type: ignore[import-not-found]

    service = Service(NOX_BACKEND=backend, NOX_SLOTS=0)
    try:
        yield Target(service.start().url, service.token)
    finally:
        service.stop()


def table(figures: dict[str, float]) -> str:
    rows = [
        ("", "bare", "Nox", "ratio"),
        *(
            (label, *(f"{figures[f'{who}{key}']:.2f}" for who in ("bare", "nox")),
             f"{figures[f'nox{key}'] / figures[f'bare{key}']:.2f}")
            for label, key in (
                ("python, a request each 20 ms, p50 (ms)", "_p50_ms"),
                ("the same, p95 (ms)", "_p95_ms"),
                ("sh, a request each 20 ms, p50 (ms)", "_sh_p50_ms"),
                ("python, 8 clients, runs/s", "_8_clients_per_s"),
            )
        ),
    ]  # fmt: skip
    return "\n".join(f"{a:42}{b:>9}{c:>9}{d:>8}" for a, b, c, d in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url")
    parser.add_argument("--token-file")
    parser.add_argument("--ca")
    parser.add_argument("--backend", default="zygote", choices=["zygote", "bubblewrap"])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if options.url:
        token = Path(options.token_file).read_text().strip() if options.token_file else os.environ["NOX_TOKEN"]
        figures = measure(Target(options.url, token, options.ca), options.count, options.seconds)
    else:
        with own_service(options.backend) as target:
            figures = measure(target, options.count, options.seconds)
    print(table(figures))
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
