"""The measurements. Run by the Python that has the service's dependencies; see __main__.py.

    measure.py --app DIR [--url URL --token-file F --ca F] [--part NAME]… --json FILE

Everything that is compared is measured in turns, so that whatever else the machine does weighs on all alike; ratios
and medians are what counts. Each part is bounded.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import resource
import shutil
import ssl
import statistics
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS = ("latency", "throughput", "cpu", "preimport", "memory", "endurance", "flood")
BACKENDS = ("zygote", "bubblewrap")
CLIENTS = 8
TURN = 10
RUNS = 10_000
FLOOD_SECONDS = 30.0
_HELLO = "print(1)"
_BARE = ["/usr/bin/python3", "-c", _HELLO]
_BARE_SHELL = ["/bin/sh", "-c", "echo 1"]
# What bubblewrap.py asks for at the least: the same namespaces and mounts, without the supervision.
_BWRAP = [
    *("bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--ro-bind", "/usr", "/usr"),
    *("--symlink", "usr/bin", "/bin", "--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64"),
    *("--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--dir", "/sandbox", "--chdir", "/sandbox"),
]  # fmt: skip
# The least that a sandbox is: a Python process that is forked into namespaces of its own. Until stdin is closed.
_FORKS = """
import os, select, sys
sys.path.append(sys.argv[1])
from nox_runner.zygote import child, kernel
count = 0
while not select.select([0], [], [], 0)[0]:
    told, program = os.pipe()
    if os.fork() == 0:
        kernel.unshare(kernel.CLONE_NEWUSER | child.NAMESPACES)
        os.write(program, b"1")
        os._exit(0)
    os.close(program)
    assert os.read(told, 1) == b"1"
    os.wait()
    os.close(told)
    count += 1
print(count)
"""
_HEAVY = ("asyncio", "email.mime.multipart", "http.client", "sqlite3", "unittest.mock", "xml.dom.minidom")


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
            return http.client.HTTPSConnection(host, parts.port, timeout=60, context=context)
        return http.client.HTTPConnection(host, parts.port, timeout=60)


def post(target: Target, connection: http.client.HTTPConnection, path: str, fields: dict[str, Any]) -> dict[str, Any]:
    """One run; its result, or {} if it was refused for too many."""
    headers = {"Authorization": f"Bearer {target.token}", "Content-Type": "application/json"}
    connection.request("POST", path, json.dumps(fields), headers)
    response = connection.getresponse()
    content = response.read()
    if response.status == 429:
        return {}
    if response.status != 200:
        raise SystemExit(f"{path}: {response.status} {content[:300]!r}")
    return dict(json.loads(content))


def hello(target: Target, path: str = "/run_py") -> Callable[[], bool]:
    """Runs a hello world on a connection of its own; a run that printed something else ends the benchmark."""
    connection = target.connect()
    fields = {"code": _HELLO} if path == "/run_py" else {"cmd": "echo 1"}

    def one() -> bool:
        result = post(target, connection, path, fields)
        if result and result["stdout"] != "1\n":
            raise SystemExit(f"a run went wrong: {result}")
        return bool(result)

    return one


def start(command: list[str]) -> Callable[[], bool]:
    """Starts a program and waits for its end."""

    def one() -> bool:
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env={}, check=True)
        return True

    return one


def in_turns(actions: dict[str, Callable[[], object]], count: int, gap: float) -> dict[str, list[float]]:
    """Milliseconds of each action, `count` times, `gap` seconds of rest before each.

    Turns are of ten: so each is measured as a client who asks again and again meets it, and all of
    them together within two seconds or three. The first turn is to get warm.
    """
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(-(-count // TURN) + 1):
        for name, action in actions.items():
            for _ in range(TURN):
                time.sleep(gap)
                started = time.perf_counter()
                action()
                taken[name].append((time.perf_counter() - started) * 1000)
    return {name: values[TURN:] for name, values in taken.items()}


def quantiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100)
    return {"p50_ms": round(cuts[49], 3), "p95_ms": round(cuts[94], 3), "p99_ms": round(cuts[98], 3)}


def rate(make: Callable[[], Callable[[], bool]], clients: int, seconds: float) -> float:
    """Successes per second of `clients` threads together."""
    rates: list[float] = []

    def work() -> None:
        action = make()
        done, started = 0, time.perf_counter()
        while (spent := time.perf_counter() - started) < seconds:
            done += action()
        rates.append(done / spent)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(rates)


# ── The parts


def latency(targets: dict[str, Target], count: int) -> dict[str, Any]:
    """One client, a request each 20 ms."""
    actions: dict[str, Callable[[], object]] = {"bare": start(_BARE), "bare_sh": start(_BARE_SHELL)}
    if shutil.which("bwrap"):
        actions["bwrap"] = start([*_BWRAP, *_BARE])
        actions["bwrap_sh"] = start([*_BWRAP, *_BARE_SHELL])
    for name, target in targets.items():
        actions[name] = hello(target)
        actions[f"{name}_sh"] = hello(target, "/run_sh")
    return {name: quantiles(values) for name, values in in_turns(actions, count, 0.02).items()}


def throughput(targets: dict[str, Target], seconds: float) -> dict[str, Any]:
    """Eight clients, runs per second; three rounds."""
    makers: dict[str, Callable[[], Callable[[], bool]]] = {"bare": lambda: start(_BARE)}
    for name, target in targets.items():
        makers[name] = lambda target=target: hello(target)  # type: ignore[misc]
    found: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(3):
        for name, make in makers.items():
            found[name].append(rate(make, CLIENTS, seconds / 3))
    return {name: round(statistics.median(values), 1) for name, values in found.items()}


def cpu(service: Callable[..., Any], app: Path, seconds: float) -> dict[str, float]:
    """Milliseconds of CPU that a run takes with eight clients, and who spends them; the same of a bare start, and of a fork.

    `all` is the whole machine's: what the other names leave of it are the sandboxes with the zygote that makes them, and the
    kernel's own threads.
    """
    with service(NOX_BACKEND="zygote") as (target, nox):
        rate(lambda: hello(target), CLIENTS, 1.0)
        pids = {"all": None, "client": os.getpid(), "front": nox.front.pid, "runner": nox.runner.pid}
        before = {name: spent(pid) for name, pid in pids.items()}
        runs = rate(lambda: hello(target), CLIENTS, seconds) * seconds
        found = {name: round((spent(pid) - before[name]) / runs, 2) for name, pid in pids.items()}
    begun = spent()
    starts = rate(lambda: start(_BARE), CLIENTS, seconds) * seconds
    found["bare"] = round((spent() - begun) / starts, 2)
    begun = spent()
    words = ["/usr/bin/python3", "-I", "-c", _FORKS, str(app)]
    pair = [subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    time.sleep(seconds)
    forks = sum(int(one.communicate()[0]) for one in pair)
    found["forks"] = round((spent() - begun) / forks, 2)
    return found


def spent(pid: int | None = None) -> float:
    """Milliseconds of CPU so far, of a process or of the machine."""
    if pid is None:
        user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
        return (user + nice + system + irq + softirq) * 1000 / os.sysconf("SC_CLK_TCK")
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1000 / os.sysconf("SC_CLK_TCK")


def preimport(service: Callable[..., Any], count: int) -> dict[str, Any]:
    """A program that imports much, with and without NOX_PREIMPORT."""
    code = "".join(f"import {name}\n" for name in _HEAVY)
    with ExitStack() as stack:
        actions: dict[str, Callable[[], object]] = {"bare": start(["/usr/bin/python3", "-c", code])}
        for name, modules in (("without", "json"), ("with", ",".join(("json", *_HEAVY)))):
            target = stack.enter_context(service(NOX_BACKEND="zygote", NOX_PREIMPORT=modules))[0]
            connection = target.connect()
            actions[name] = lambda t=target, c=connection: post(t, c, "/run_py", {"code": code})  # type: ignore[misc]
        taken = in_turns(actions, count, 0.02)
    return {"modules": list(_HEAVY), **{name: quantiles(values) for name, values in taken.items()}}


def memory(service: Callable[..., Any]) -> dict[str, Any]:
    """MiB of an idle service that has served: resident of each process, and what is not shared of its helpers."""
    found = {}
    for backend in BACKENDS:
        with service(NOX_BACKEND=backend) as (target, nox):
            run = hello(target)
            for _ in range(50):
                run()
            time.sleep(1)
            front, runner = resident(nox.front.pid), resident(nox.runner.pid)
            # A sandbox's init shares the zygote's memory, which counts once.
            own = [
                pid
                for pid in descendants(nox.runner.pid)
                if depth(pid) < depth(nox.runner.pid) + 2 or not is_first(pid)
            ]
            helpers = sum(proportional(pid) for pid in own)
            found[backend] = {"front": front, "runner": runner, "both": round(front + runner, 1), "ready": helpers}
    return found


def endurance(service: Callable[..., Any], runs: int) -> dict[str, Any]:
    """Run after run on one connection: what grew, and whether the last are as quick as the first."""
    with service(NOX_BACKEND="zygote") as (target, nox):
        run = hello(target)
        for _ in range(300):
            run()
        before = state(nox)
        taken = []
        for _ in range(runs):
            started = time.perf_counter()
            run()
            taken.append((time.perf_counter() - started) * 1000)
        time.sleep(1)
        after = state(nox)
    edge = min(1000, runs // 2)
    first, last = quantiles(taken[:edge]), quantiles(taken[-edge:])
    step = max(1, runs // 200)
    line = [round(statistics.median(taken[i : i + step]), 2) for i in range(0, runs, step)]
    return {"runs": runs, "before": before, "after": after, "first": first, "last": last, "line": line}


def flood(service: Callable[..., Any], seconds: float) -> dict[str, Any]:
    """Resident MiB of both processes, twice a second, while eight clients have programs print without end."""
    with service(NOX_BACKEND="zygote", NOX_TIMEOUT=5) as (target, nox):
        stop = threading.Event()
        counts: list[int] = []

        def attack() -> None:
            connection = target.connect()
            count = 0
            while not stop.is_set():
                result = post(target, connection, "/run_sh", {"cmd": "yes"})
                if result and result["status"] != "output_limit":
                    raise SystemExit(f"a flood ended with {result['status']}")
                count += bool(result)
            counts.append(count)

        hello(target)()
        threads = [threading.Thread(target=attack) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        line = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            line.append([resident(nox.front.pid), resident(nox.runner.pid)])
            time.sleep(0.5)
        stop.set()
        for thread in threads:
            thread.join()
    return {"seconds": seconds, "runs": sum(counts), "line": line}


# ── What a process holds


def resident(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * resource.getpagesize() / (1 << 20), 1)


def proportional(pid: int) -> float:
    """MiB, a shared page counted in parts."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return round(int(line.split()[1]) / 1024, 1)
    except OSError:
        pass
    return 0.0


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            found += map(int, (task / "children").read_text().split())
        except OSError:
            continue
    return found


def descendants(pid: int) -> list[int]:
    found = []
    waiting = children(pid)
    while waiting:
        found.append(one := waiting.pop())
        try:
            waiting += children(one)
        except OSError:
            continue
    return found


def state(nox: Any) -> dict[str, float]:
    """What must not grow."""
    front, runner = nox.front.pid, nox.runner.pid
    helpers = at_rest(runner)
    # Its own pid namespace's second process; the first one is the child of what the runner started.
    zygote = next(pid for pid in helpers if not is_first(pid) and depth(pid) == depth(runner) + 1)
    return {
        "front MiB": resident(front),
        "runner MiB": resident(runner),
        "front descriptors": entries(f"/proc/{front}/fd"),
        "runner descriptors": entries(f"/proc/{runner}/fd"),
        "zygote descriptors": entries(f"/proc/{zygote}/fd"),
        "runner threads": entries(f"/proc/{runner}/task"),
        "mounts of the zygote": len(Path(f"/proc/{zygote}/mountinfo").read_text().splitlines()),
        "processes below the runner": len(helpers),
        "zombies": sum(is_zombie(pid) for pid in helpers),
        "control groups": groups(runner),
    }


def at_rest(pid: int) -> list[int]:
    """The descendants of a process when none has come or gone for half a second: the pool is full, the dead are gone."""
    found, since, end = descendants(pid), time.monotonic(), time.monotonic() + 20
    while time.monotonic() < min(since + 0.5, end):
        time.sleep(0.02)
        if (now := descendants(pid)) != found:
            found, since = now, time.monotonic()
    return found


def entries(directory: str) -> int:
    return sum(1 for _ in Path(directory).iterdir())


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False


def depth(pid: int) -> int:
    """Of its pid namespace."""
    return len(numbers(pid))


def is_first(pid: int) -> bool:
    """Whether it is the init of its pid namespace."""
    return numbers(pid)[-1] == "1"


def numbers(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/status").read_text().partition("NSpid:")[2].partition("\n")[0].split()


def groups(runner: int) -> int:
    """Control groups of version 2 beside the runner's own, where those of runs are made."""
    own = next((x[3:] for x in Path(f"/proc/{runner}/cgroup").read_text().splitlines() if x.startswith("0::/")), "")
    place = Path("/sys/fs/cgroup" + own)
    return sum(1 for path in place.glob("run-*")) if own.strip("/") else 0


# ── Whom to measure


def own_service(app: Path) -> Callable[..., Any]:
    """Makes a front and a runner of the checkout, on loopback, for as long as a `with` lasts."""
    sys.path[:0] = [str(app / "tests"), str(app)]
    from service import Service  # type: ignore[import-not-found]

    # Not below /tmp, where no installed host has it.
    Service.home = "/var/tmp"

    @contextmanager
    def service(**settings: object) -> Iterator[tuple[Target, Any]]:
        nox = Service(**{"NOX_SLOTS": 0, "NOX_TIMEOUT": 20, **settings})
        try:
            yield Target(nox.start().url, nox.token), nox
        finally:
            nox.stop()

    return service


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--app", type=Path, required=True)
    parser.add_argument("--url")
    parser.add_argument("--token-file")
    parser.add_argument("--ca")
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--flood-seconds", type=float, default=FLOOD_SECONDS)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    service = own_service(options.app)
    parts = options.part or PARTS
    figures: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    with ExitStack() as stack:
        targets = {}
        if {"latency", "throughput"} & set(parts):
            targets = {name: stack.enter_context(service(NOX_BACKEND=name))[0] for name in BACKENDS}
            if options.url:
                targets["tls"] = Target(options.url, Path(options.token_file).read_text().strip(), options.ca)
        actions: dict[str, Callable[[], dict[str, Any]]] = {
            "latency": lambda: latency(targets, options.count),
            "throughput": lambda: throughput(targets, options.seconds),
            "cpu": lambda: cpu(service, options.app, options.seconds),
            "preimport": lambda: preimport(service, options.count // 3),
            "memory": lambda: memory(service),
            "endurance": lambda: endurance(service, options.runs),
            "flood": lambda: flood(service, options.flood_seconds),
        }
        for part in PARTS:
            if part in parts:
                print(f"measuring: {part}", file=sys.stderr, flush=True)
                figures[part] = actions[part]()
                options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
