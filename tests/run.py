"""``make test``: every proof of the project, step by step, with a table at the end.

    python tests/run.py [lint] [unit] [molecule] [matrix] [--list]

`matrix` is the whole damage matrix; without a name every group is run but that, of which `molecule` does a part. A step that can't run here is named with its reason; it never passes silently. Exit codes: 0 all that could run
passed, 1 something failed, 2 usage.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
TARGET_PYTHONS = ("3.10", "3.11")  # Ubuntu 22.04's, and the lab's default suite's
MOLECULE_SCENARIOS = ("default", "nginx")
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


def run(*words: str | Path, cwd: Path = ROOT, environment: dict[str, str] | None = None) -> None:
    command = [str(word) for word in words]
    print(f"$ {' '.join(command)}", flush=True)
    done = subprocess.run(command, cwd=cwd, env={**ENVIRONMENT, **(environment or {})}, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise Failed(f"status {done.returncode}: {' '.join(command)}")


# ── The steps


def ruff() -> None:
    run("ruff", "check", ".")
    run("ruff", "check", ".", cwd=ROOT / "app")
    run("ruff", "format", "--check", ".", "roles/nox_tools/files/nox-debug", "roles/nox_tools/files/nox-monitor")
    run("ruff", "format", "--check", ".", cwd=ROOT / "app")


def mypy() -> None:
    run("mypy", "lab", "tests/run.py", "tests/hostile", "playbooks/drift.py")
    run("mypy", "roles/nox_tools/files/nox-debug")
    run("mypy", "roles/nox_tools/files/nox-monitor")
    modules = sorted([*(ROOT / "plugins/modules").glob("*.py"), *(ROOT / "plugins/callback").glob("*.py")])
    run("mypy", "--config-file", ROOT / "pyproject.toml", *modules, cwd=ROOT / ".collections")


def mypy_app() -> None:
    # the service's dependencies are in its own environment, mypy is in ours
    run("mypy", "--python-executable", app_python("3.11"), "nox_api", "nox_runner", "tests", cwd=ROOT / "app")


def yamllint() -> None:
    run("yamllint", "--strict", ".")


def shellcheck() -> None:
    run("shellcheck", "-x", *sorted((ROOT / "tests").glob("*.sh")), ROOT / ".ci/run")


def ansible_lint() -> None:
    run("ansible-lint", "--offline", "--profile=production", "--strict")


def unit_control() -> None:
    run("pytest", "-q", "tests/unit")


def find_python(version: str) -> Path:
    """An interpreter of this version that is on the machine, pyenv's included; nothing is downloaded."""
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
    venv = test_home() / f"venv-{version}"
    complete = venv / "complete"
    if not complete.exists() or complete.read_text() != digest:
        shutil.rmtree(venv, ignore_errors=True)
        python = find_python(version)
        if os.geteuid() == 0 and not reachable(python):
            python = copied(python, test_home() / f"cpython-{version}")
        libraries = app_libraries(version)
        # by our own pip: not every interpreter on a machine brings one
        run(python, "-m", "venv", "--without-pip", venv, environment=libraries)
        pip = (BIN / "python", "-m", "pip", "--python", venv / "bin/python", "install", "--quiet")
        run(*pip, "--require-hashes", "--requirement", lock, environment=libraries)
        complete.write_text(digest)
    return venv / "bin/python"


def copied(python: Path, place: Path) -> Path:
    """An interpreter with its standard library, copied to where every user can start it."""
    prefix = python.resolve().parent.parent
    print(f"copying {prefix} to {place}: other users can't reach it where it is", flush=True)
    shutil.rmtree(place, ignore_errors=True)
    skipped = shutil.ignore_patterns("test", "site-packages", "__pycache__", "*.a", "share")
    shutil.copytree(prefix, place, symlinks=True, ignore=skipped)
    return place / "bin" / python.resolve().name


def app_libraries(version: str) -> dict[str, str]:
    """What a copied interpreter needs to find its own libpython, and not the one of where it was copied from."""
    place = test_home() / f"cpython-{version}"
    return {"LD_LIBRARY_PATH": str(place / "lib")} if place.exists() else {}


def unit_app(version: str) -> Callable[[], None]:
    def step() -> None:
        require_package("bwrap", "bubblewrap")
        app = ROOT / "app"
        python = app_python(version)
        with tempfile.TemporaryDirectory(prefix="app-", dir=test_home()) as place:
            if os.geteuid() == 0 and not reachable(app / "pyproject.toml"):
                Path(place).chmod(0o755)
                app = shutil.copytree(ROOT / "app", Path(place) / "app")
            # from app/, whose packages need no installation there
            run(python, "-m", "pytest", "-p", "no:cacheprovider", "tests", cwd=app, environment=app_libraries(version))

    return step


def require_package(program: str, package: str) -> None:
    if shutil.which(program):
        return
    if os.geteuid() != 0:
        raise CannotRunHere(f"{package} is missing: sudo apt-get install {package}")
    run("apt-get", "update", "-qq")
    run("apt-get", "install", "-qq", "-y", package)


def molecule(scenario: str, **environment: str) -> Callable[[], None]:
    def step() -> None:
        check = subprocess.run([sys.executable, "-m", "lab", "check"], cwd=ROOT, capture_output=True, text=True)
        if check.returncode != 0:
            raise CannotRunHere((check.stdout + check.stderr).strip())
        try:
            run("molecule", "test", "--scenario-name", scenario, environment=environment)
        finally:
            # a scenario that died half-way has not destroyed its hosts
            run(sys.executable, "-m", "lab", "down", f"--lab=m-{scenario}")

    return step


def whole_matrix() -> None:
    if "matrix" not in sys.argv[1:]:
        raise CannotRunHere("on request, a quarter of an hour: make matrix")
    molecule("repair")()


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
    Step("unit", "control side", unit_control),
    *(Step("unit", f"service on Python {version}", unit_app(version)) for version in TARGET_PYTHONS),
    *(Step("molecule", f"molecule: {name}", molecule(name)) for name in MOLECULE_SCENARIOS),
    Step("molecule", "molecule: repair, a part", molecule("repair", NOX_MATRIX_EVERY="4", NOX_MATRIX_PAIRS="4")),
    Step("matrix", "molecule: repair, the whole", whole_matrix),
)


def main(arguments: list[str]) -> int:
    groups = sorted({step.group for step in STEPS})
    if "--list" in arguments:
        print("\n".join(f"{step.group:9} {step.name}" for step in STEPS))
        return 0
    if unknown := [word for word in arguments if word not in groups]:
        print(f"unknown: {' '.join(unknown)}; there are: {' '.join(groups)}\n{__doc__}", file=sys.stderr)
        return 2
    outcomes: list[tuple[str, str, float, str]] = []
    for step in STEPS:
        if arguments and step.group not in arguments:
            continue
        print(f"\n━━ {step.name}", flush=True)
        started = time.monotonic()
        try:
            step.action()
            outcome, reason = "passed", ""
        except CannotRunHere as error:
            outcome, reason = "not run", str(error)
        except (Failed, FileNotFoundError) as error:
            outcome, reason = "FAILED", str(error)
        outcomes.append((step.name, outcome, time.monotonic() - started, reason))
    width = max(len(name) for name, *_ in outcomes)
    print(f"\n━━ {'step':{width}}  {'outcome':8} seconds")
    for name, outcome, seconds, reason in outcomes:
        print(f"   {name:{width}}  {outcome:8} {seconds:7.1f}{'  ' + reason if reason else ''}")
    count = {word: sum(o == word for _, o, _, _ in outcomes) for word in ("passed", "FAILED", "not run")}
    print(f"\nsteps: {count['passed']} passed, {count['FAILED']} failed, {count['not run']} skipped")
    return 1 if count["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
