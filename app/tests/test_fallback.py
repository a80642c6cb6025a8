"""Which backend serves where one of them cannot be trusted.

The faults are put into the runner's own process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from service import APP, Service, as_user, environment, wait_for

Make = Callable[..., Service]

NO_ZYGOTE = "from nox_runner.zygote import pool; pool._PYTHON = '/bin/false'"
SHARED_IPC = """
from nox_runner.zygote import pool
pool._START = pool._START.replace(
    "sys.exit", "nest.child.NAMESPACES &= ~nest.kernel.CLONE_NEWIPC; sys.exit"
)
"""
SHARED_MEMORY = """
from nox_runner.zygote import pool
pool._START = pool._START.replace(
    "sys.exit", "import mmap; held = mmap.mmap(-1, 4096); sys.exit"
)
"""
NO_SETNS = """
from nox_runner.zygote import pool
pool._START = pool._START.replace(
    "sys.exit", "nest.kernel._libc.setns = lambda *_: -1; sys.exit"
)
"""
OPEN_FILTER = "from nox_runner import seccomp; seccomp._NAMES += ' unshare'"


def with_fault(nox: Service, fault: str) -> Service:
    """Start `nox`, its runner with `fault` run first."""
    starter = nox.root / "runner.py"
    starter.write_text(
        f"{fault}\nimport sys\nfrom nox_runner.__main__ import main\nsys.exit(main())\n"
    )
    starter.chmod(0o644)
    with open(nox.root / "nox_runner.stderr", "ab") as stderr:
        nox.runner = subprocess.Popen(
            as_user(
                sys.executable, str(starter), "--settings", str(nox.runner_settings), "--socket",
                str(nox.socket), "--client-user", "self",
            ),
            cwd=APP, env={**environment(), "PYTHONPATH": str(APP)}, stdin=subprocess.DEVNULL,
            stderr=stderr,
        )  # fmt: skip
    wait_for(lambda: '"ready"' in nox.runner_log(), "the runner")
    nox.start_front()
    return nox


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (NO_ZYGOTE, "does not start"),
        (NO_SETNS, "setns"),
        (SHARED_MEMORY, "memory that all runs would share"),
        (SHARED_IPC, "shared with the host: ipc"),
    ],
)
def test_auto_falls_back_and_says_why(own: Make, fault: str, reason: str) -> None:
    nox = with_fault(own(NOX_BACKEND="auto"), fault)
    detail = nox.detail()
    assert detail["runner"]["backend"] == "bubblewrap"
    assert reason in detail["limits"]["not_enforced"]["fast_start"]
    assert "backend_fallback" in nox.runner_log()
    assert nox.python("print(6 * 7)")["stdout"] == "42\n"


def test_auto_is_the_default_and_takes_the_zygote(own: Make) -> None:
    nox = own()
    del nox.settings["NOX_BACKEND"]
    nox.write_settings()
    assert nox.start().detail()["runner"]["backend"] == "zygote"


@pytest.mark.parametrize("backend", ["zygote", "bubblewrap", "auto"])
def test_nothing_runs_where_a_wall_is_missing(own: Make, backend: str) -> None:
    nox = with_fault(own(NOX_BACKEND=backend), OPEN_FILTER)
    with nox.client() as client:
        health = client.get("/health")
        assert health.status_code == 503 and "unshare is not refused" in health.json()["detail"]
        assert client.post("/run_py", json={"code": "print(1)"}).status_code == 503


OTHER_PYTHON = """
from nox_runner import proof
from nox_runner.zygote import pool

def use(python, prefix):
    config = pool._config
    def with_its_library(plan):
        made = config(plan)
        return {**made, "roots": [*made["roots"], prefix]}
    pool._PYTHON = python
    if not prefix.startswith("/usr"):
        pool._config = with_its_library
        # Its way to its own libpython.
        proof._ENVIRONMENT += ("LD_LIBRARY_PATH",)
"""
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
PROGRAMS = {
    "import sys; print(*sys.version_info[:2], sep='.')": f"{VERSION}\n",
    "import threading\nt = threading.Thread(target=print, args=('t',)); t.start(); t.join()": "t\n",
    "import subprocess; print(subprocess.run(['echo', 'x'], capture_output=True).stdout)": (
        "b'x\\n'\n"
    ),
    "import csv, decimal, zlib; print(decimal.Decimal('1.10') * 2)": "2.20\n",
    "import multiprocessing as m\nwith m.Pool(2) as p: print(p.map(abs, [-1, 2]))": "[1, 2]\n",
    "f = open('x', 'w'); f.write('kept')": "",
    "print(open('x').read())": "kept\n",
}


def test_the_zygote_by_the_suites_own_python(own: Make) -> None:
    """Supported hosts have Python 3.10 to 3.13; the suite is run by several of them."""
    nox = own(NOX_BACKEND="zygote")
    python = nox.root / "python3"
    libraries = os.environ.get("LD_LIBRARY_PATH", "")
    interpreter = Path(sys.base_prefix, "bin", f"python{VERSION}")
    way = f"LD_LIBRARY_PATH={libraries} " if libraries else ""
    python.write_text(f'#!/bin/sh\n{way}exec {interpreter} "$@"\n')
    python.chmod(0o755)
    with_fault(nox, f"{OTHER_PYTHON}\nuse({str(python)!r}, {sys.base_prefix!r})")
    for program, printed in PROGRAMS.items():
        told = nox.python(program)
        assert (told["status"], told["stdout"]) == ("ok", printed), (program, told)
    assert nox.python("import os; os.kill(os.getpid(), 15)")["signal"] == 15
    assert nox.python("raise SystemExit(3)")["exit_code"] == 3
    assert nox.shell("echo $0; exit 4", stdin="")["exit_code"] == 4
    assert nox.python("while True: pass", timeout=0.3)["status"] == "timeout"
