"""``make test``: every proof of the project, step by step, with a table at the end.

    python tests/run.py [GROUP ...] [--jobs N] [--list]

Without a group all are run but those of `ON_REQUEST`, which are named with the command that runs them. Two steps run at a time
where there are two cores: much of a scenario is waiting. A step's output is printed whole when it ends badly, else its last
lines; .run/logs has all of it. A step that can't run here is named with its reason; it never passes silently. Exit codes: 0 all
that could run passed, 1 something failed, 2 usage.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
TARGET_PYTHONS = ("3.10", "3.11")  # Ubuntu 22.04's, and the lab's default suite's
YOUNG_PYTHONS = ("3.12", "3.13")  # of Ubuntu 24.04 and Debian 13: the fast backend is run by the host's own
MOLECULE_SCENARIOS = ("default", "nginx", "fleet")
# Group → how to have it. All of them together take about three hours; what is left out is said at the end of each run.
ON_REQUEST = {
    "matrix": "make matrix, a quarter of an hour",
    "faults": "tests/run.py faults, half an hour",
    "lifecycle": "tests/run.py lifecycle, 11 minutes",
    "harden": "tests/run.py harden, 12 minutes",
    "acme": "tests/run.py acme, 5 minutes",
    "guides": "tests/run.py guides, 15 minutes",
    "history": "tests/run.py history, 6 minutes",
    "troubleshooting": "tests/run.py troubleshooting, half an hour",
    "container": "tests/run.py container, 15 minutes",
    "hostile": "tests/run.py hostile, 15 minutes",
}
LAST_LINES = 12  # of a step that passed
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
    "PY_COLORS": "0",
    "NO_COLOR": "1",
    "ANSIBLE_NOCOLOR": "1",
}


class CannotRunHere(Exception):
    """This machine lacks something the step needs; the message says what."""


class Failed(Exception):
    """A command of the step ended with another status than 0."""


class _Output(threading.local):
    """Where the step of this thread writes."""

    file: TextIO = sys.stdout


output = _Output()
one_at_a_time = threading.Lock()  # for what two steps would both install
scenarios: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # two steps of one have the same hosts


running: set[subprocess.Popen[bytes]] = set()
ended = threading.Event()  # by Ctrl-C or a kill: nothing begins any more but what takes hosts down


def end(process: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C would, so that it clears up; all of its session, which it leads."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)


def end_all(*_: object) -> None:
    ended.set()
    for process in list(running):
        end(process)


def status_of(
    *words: str | Path, cwd: Path = ROOT, environment: dict[str, str] | None = None, in_any_case: bool = False
) -> int:
    command = [str(word) for word in words]
    print(f"$ {' '.join(command)}", file=output.file, flush=True)
    merged = {**ENVIRONMENT, **(environment or {})}
    if ended.is_set() and not in_any_case:
        raise Failed("ended before it began")
    process = subprocess.Popen(
        command, cwd=cwd, env=merged, stdin=subprocess.DEVNULL, stdout=output.file, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    if not in_any_case:
        running.add(process)
        if ended.is_set():  # meanwhile
            end(process)
    try:
        return process.wait()
    finally:
        running.discard(process)


def run(
    *words: str | Path, cwd: Path = ROOT, environment: dict[str, str] | None = None, in_any_case: bool = False
) -> None:
    status = status_of(*words, cwd=cwd, environment=environment, in_any_case=in_any_case)
    if status != 0:
        raise Failed(f"status {status}: {' '.join(map(str, words))}")


# ── The steps


def ruff() -> None:
    run("ruff", "check", ".")
    run("ruff", "check", ".", cwd=ROOT / "app")
    run("ruff", "format", "--check", ".", "roles/nox_tools/files/nox-debug", "roles/nox_tools/files/nox-monitor")
    run("ruff", "format", "--check", ".", cwd=ROOT / "app")


def mypy() -> None:
    run("mypy", "lab", "playbooks/drift.py", "docs/generate.py", "docs/pages.py")
    run(
        "mypy",
        "tests/run.py",
        "tests/load.py",
        "tests/collection.py",
        "tests/guides.py",
        "tests/history.py",
        "tests/troubleshooting.py",
        "tests/acme",
    )
    run("mypy", "tests/hostile", "tests/container_deployment.py")
    run("mypy", "--python-version=3.11", "noxctl", "tests/bench", "tests/releases.py")
    for script in ("roles/nox_tools/files/nox-debug", "container/start", "container/health"):
        run("mypy", script)
    run("mypy", "roles/nox_tools/files/nox-monitor")
    for kinds in (("modules", "callback"), ("action", "plugin_utils")):  # a module and its action plugin have one name
        plugins = sorted(path for kind in kinds for path in (ROOT / "plugins" / kind).glob("*.py"))
        run("mypy", "--config-file", ROOT / "pyproject.toml", *plugins, cwd=ROOT / ".collections")


def mypy_app() -> None:
    # the service's dependencies are in its own environment, mypy is in ours
    run("mypy", "--python-executable", app_python("3.11"), "nox_api", "nox_runner", "tests", cwd=ROOT / "app")


def yamllint() -> None:
    run("yamllint", "--strict", ".")


def shellcheck() -> None:
    run(
        "shellcheck",
        "-x",
        *sorted((ROOT / "tests").rglob("*.sh")),
        ROOT / ".ci/run",
        ROOT / "roles/nox_edge/files/nox-edge-certificates",
    )


def ansible_lint() -> None:
    run("ansible-lint", "--offline", "--profile=production", "--strict")


def role_docs() -> None:
    run(sys.executable, "docs/generate.py", "--check")


def docs() -> None:
    """Pages without dead links, and without anything that a browser would load from elsewhere."""
    run("make", "docs", f"PYTHON={sys.executable}")
    foreign = re.compile(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
    found = {tag for page in (ROOT / ".run/site").rglob("*.html") for tag in foreign.findall(page.read_text())}
    if found:
        raise Failed(f"pages load from elsewhere: {' '.join(sorted(found))}")
    # Python's Markdown wants an empty line before a list, GitHub's doesn't.
    code, item = re.compile(r"<(pre|script|style)\b.*?</\1>", re.DOTALL), re.compile(r"(?m)^(?:[*-]|\d+\.) ")
    run_on = [page.name for page in (ROOT / ".run/site").rglob("*.html") if item.search(code.sub("", page.read_text()))]
    if run_on:
        raise Failed(f"lists that are no lists, for want of an empty line before them: {' '.join(sorted(run_on))}")


def unit_control() -> None:
    run("pytest", "-q", "tests/unit")


def find_python(version: str) -> Path:
    """An interpreter of this version that is on the machine, pyenv's included; nothing is downloaded.

    The system's own first: it is what a host runs the service with, and built with more care for speed.
    """
    if (system := Path(f"/usr/bin/python{version}")).exists():
        return system
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for python in sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}"), reverse=True):
        return python
    found = subprocess.run(
        [BIN / "uv", "python", "find", "--no-python-downloads", "--no-project", "--system", version],
        cwd="/",
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    if found.returncode != 0:
        raise CannotRunHere(f"no Python {version} on this machine")
    return Path(found.stdout.strip())


def test_home() -> Path:
    """Where the service's test environments live. As root: where another user can reach them, because the tests
    start the service as the unprivileged user it is made for."""
    home = Path("/var/cache/nox-tests") if os.geteuid() == 0 else ROOT / ".run/tests"
    home.mkdir(parents=True, exist_ok=True)
    return home


def reachable(path: Path) -> bool:
    """Whether any user may enter the directories that lead to a file."""
    return all(parent.stat().st_mode & 0o001 for parent in path.resolve().parents)


def app_python(version: str) -> Path:
    """The interpreter of a virtual environment with the service's locked dependencies and test tools."""
    lock = ROOT / "requirements/app-test.lock"
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()
    venv = test_home() / f"venv-{version}-{digest[:8]}"  # checkouts with other locks have others
    complete = venv / "complete"
    with one_at_a_time:
        python = find_python(version)
        made_of = f"{digest} {python}"
        if complete.exists() and complete.read_text() == made_of:
            return venv / "bin/python"
        shutil.rmtree(venv, ignore_errors=True)
        shutil.rmtree(test_home() / f"cpython-{version}", ignore_errors=True)
        if os.geteuid() == 0 and not reachable(python):
            python = copied(python, test_home() / f"cpython-{version}")
        libraries = app_libraries(version)
        # by our own pip: not every interpreter on a machine brings one
        run(python, "-m", "venv", "--without-pip", venv, environment=libraries)
        pip = (BIN / "python", "-m", "pip", "--python", venv / "bin/python", "install", "--quiet")
        run(*pip, "--require-hashes", "--requirement", lock, environment=libraries)
        complete.write_text(made_of)
    return venv / "bin/python"


def copied(python: Path, place: Path) -> Path:
    """An interpreter with its standard library, copied to where every user can start it."""
    prefix = python.resolve().parent.parent
    print(f"copying {prefix} to {place}: other users can't reach it where it is", file=output.file, flush=True)
    shutil.rmtree(place, ignore_errors=True)
    skipped = shutil.ignore_patterns("test", "site-packages", "__pycache__", "*.a", "share")
    shutil.copytree(prefix, place, symlinks=True, ignore=skipped)
    return place / "bin" / python.resolve().name


def app_libraries(version: str) -> dict[str, str]:
    """What a copied interpreter needs to find its own libpython, and not the one of where it was copied from."""
    place = test_home() / f"cpython-{version}"
    return {"LD_LIBRARY_PATH": str(place / "lib")} if place.exists() else {}


def unit_app(version: str, *tests: str) -> Callable[[], None]:
    def step() -> None:
        require_package("bwrap", "bubblewrap")
        app = ROOT / "app"
        python = app_python(version)
        with tempfile.TemporaryDirectory(prefix="app-", dir=test_home()) as place:
            if os.geteuid() == 0 and not reachable(app / "pyproject.toml"):
                Path(place).chmod(0o755)
                app = shutil.copytree(ROOT / "app", Path(place) / "app")
            # from app/, whose packages need no installation there
            pytest = (python, "-m", "pytest", "-p", "no:cacheprovider")
            run(*pytest, *(tests or ("tests",)), cwd=app, environment=app_libraries(version))

    return step


def zygote_on(version: str) -> Callable[[], None]:
    return lambda: unit_app(version, "tests/test_fallback.py", "tests/test_programs.py")()


def require_package(program: str, package: str) -> None:
    if shutil.which(program):
        return
    if os.geteuid() != 0:
        raise CannotRunHere(f"{package} is missing: sudo apt-get install {package}")
    # the lab's own way: scenarios that begin meanwhile install things too, and apt has one lock that doesn't wait
    code = f"from lab.machine import need_tools; need_tools({{{program!r}: {package!r}}})"
    run(sys.executable, "-c", code)


def require_lab() -> None:
    check = subprocess.run([sys.executable, "-m", "lab", "check"], cwd=ROOT, capture_output=True, text=True)
    if check.returncode != 0:
        raise CannotRunHere((check.stdout + check.stderr).strip())


def molecule(scenario: str, **environment: str) -> Callable[[], None]:
    def step() -> None:
        require_lab()
        with scenarios[scenario]:
            try:
                run("molecule", "test", "--scenario-name", scenario, environment=environment)
            finally:
                # a scenario that died half-way has not destroyed its hosts
                run(sys.executable, "-m", "lab", "down", f"--lab=m-{scenario}", in_any_case=True)

    return step


def program(*words: str, cannot: int, why: str, lab: bool = True) -> Callable[[], None]:
    """A test that is a program, and brings up and takes down what it needs; its exit code `cannot` says it can't here."""

    def step() -> None:
        if lab:
            require_lab()
        status = status_of(sys.executable, *words)
        if status == cannot:
            raise CannotRunHere(why)
        if status != 0:
            raise Failed(f"status {status}: python {' '.join(words)}")

    return step


def on_lab_hosts(module: str) -> Callable[[], None]:
    return program("-m", module, cannot=4, why="a demo or lab of that name is up: its last line says how to end it")


def hostile(kind: str, *options: str) -> Callable[[], None]:
    words = ("-m", "tests.hostile.lab", "--kind", kind, *options)
    return program(*words, cannot=4, why=f"this machine can't have lab hosts of the kind {kind}, see above")


def containers() -> Callable[[], None]:
    return program("-m", "tests.container_deployment", cannot=3, why="its last line says why", lab=False)


@dataclass(frozen=True)
class Step:
    group: str
    name: str
    action: Callable[[], None]


STEPS = (
    Step("lint", "ruff", ruff),
    Step("lint", "mypy --strict", mypy),
    Step("lint", "mypy --strict, service", mypy_app),
    Step("lint", "yamllint", yamllint),
    Step("lint", "shellcheck", shellcheck),
    Step("lint", "ansible-lint, production profile", ansible_lint),
    Step("lint", "role READMEs and variables page are fresh", role_docs),
    Step("docs", "documentation builds, links hold", docs),
    Step("unit", "control side", unit_control),
    *(Step("unit", f"service on Python {version}", unit_app(version)) for version in TARGET_PYTHONS),
    *(Step("unit", f"zygote on Python {version}", zygote_on(version)) for version in YOUNG_PYTHONS),
    *(Step("molecule", f"molecule: {name}", molecule(name)) for name in MOLECULE_SCENARIOS),
    Step("molecule", "molecule: repair, a part", molecule("repair", NOX_MATRIX_PART="1/4")),
    Step("lifecycle", "molecule: lifecycle", molecule("lifecycle")),
    Step("harden", "molecule: harden", molecule("harden")),
    Step("faults", "molecule: fleet, every fault", molecule("fleet", NOX_FLEET_TESTS="trouble")),
    Step("acme", "certificates: obtained, served, renewed", on_lab_hosts("tests.acme")),
    Step("collection", "collection archive alone installs a host", on_lab_hosts("tests.collection")),
    Step("guides", "guides followed to the letter", on_lab_hosts("tests.guides")),
    Step("history", "history: told, kept, bounded", on_lab_hosts("tests.history")),
    Step("troubleshooting", "troubleshooting pages: each symptom, each advice", on_lab_hosts("tests.troubleshooting")),
    Step("container", "container deployment", containers()),
    Step("hostile", "52 hostile cases, both backends", hostile("nspawn")),
    # Real control groups are User-mode Linux's alone; with less memory than its host has.
    Step("hostile", "hostile: control groups", hostile("uml", "--memory", "128M", "2", "3", "4", "11", "12")),
    # On a host of its own: with half of its slow core the others don't end in their time.
    Step("hostile", "hostile: cores", hostile("uml", "--lab", "hostile-cores", "--cpus", "0.5", "46")),
    Step("matrix", "molecule: repair, the whole", molecule("repair")),
)


def attempt(step: Step, log: Path | None) -> tuple[str, float, str]:
    """Outcome, seconds, reason; the step's output goes to the log, or straight out where there is none."""
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        output.file = stack.enter_context(log.open("w", encoding="utf-8")) if log else sys.stdout
        try:
            step.action()
            outcome, reason = "passed", ""
        except CannotRunHere as error:
            outcome, reason = "not run", str(error)
        except (Failed, FileNotFoundError) as error:
            outcome, reason = "FAILED", str(error)
    return outcome, time.monotonic() - started, reason


def run_all(steps: list[Step], jobs: int) -> dict[str, tuple[str, float, str]]:
    """Step's name → outcome, seconds, reason; prints each when it has ended."""
    if jobs == 1:
        outcomes = {}
        for step in steps:
            print(f"\n━━ {step.name}", flush=True)
            outcomes[step.name] = attempt(step, None)
        return outcomes
    logs = ROOT / ".run/logs"
    logs.mkdir(parents=True, exist_ok=True)  # what others have there may be of a run that is on its way
    outcomes = {}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        # the long ones first, so that no lane is left with one of them at the end
        ranked = sorted(steps, key=lambda step: step.group in ("lint", "unit"))
        running = {}
        for step in ranked:
            log = logs / f"{re.sub('[^a-z0-9.]+', '-', step.name.lower())}.log"
            running[pool.submit(attempt, step, log)] = (step, log)
        for future in concurrent.futures.as_completed(running):
            step, log = running[future]
            outcomes[step.name] = outcome, seconds, reason = future.result()
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            shown = lines if outcome == "FAILED" else lines[-LAST_LINES:]
            print(f"\n━━ {step.name}: {outcome} in {seconds:.0f} s {reason}\n" + "\n".join(shown), flush=True)
    return {step.name: outcomes[step.name] for step in steps}


def main(arguments: list[str]) -> int:
    groups = sorted({step.group for step in STEPS})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"some of: {' '.join(groups)}")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="steps at a time (%(default)s)")
    parser.add_argument("--list", action="store_true", help="say what there is, run nothing")
    wanted = parser.parse_args(arguments)
    if unknown := [word for word in wanted.groups if word not in groups]:
        parser.error(f"unknown: {' '.join(unknown)}; there are: {' '.join(groups)}")
    if wanted.list:
        print("\n".join(f"{step.group:15} {step.name}" for step in STEPS))
        return 0
    chosen = wanted.groups or [group for group in groups if group not in ON_REQUEST]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_all)
    outcomes = run_all([step for step in STEPS if step.group in chosen], max(1, wanted.jobs))
    for step in STEPS:
        if step.group in ON_REQUEST and not wanted.groups:
            outcomes[step.name] = ("not run", 0.0, f"on request: {ON_REQUEST[step.group]}")
    width = max(len(name) for name in outcomes)
    print(f"\n━━ {'step':{width}}  {'outcome':8} seconds")
    for name, (outcome, seconds, reason) in outcomes.items():
        print(f"   {name:{width}}  {outcome:8} {seconds:7.1f}{'  ' + reason if reason else ''}")
    count = Counter(outcome for outcome, _, _ in outcomes.values())
    print(f"\nsteps: {count['passed']} passed, {count['FAILED']} failed, {count['not run']} skipped")
    return 1 if count["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
