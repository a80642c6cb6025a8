"""What the fleet's tests share: the load, a look-out for the secret, and the table of faults."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rollouts
import yaml

_faults: list[tuple[str, str, str, str]] = []
_failed: set[str] = set()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(what, expected): a row of the table at the end of the run")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    marker = item.get_closest_marker("fault")
    if marker and not report.passed:
        _failed.add(item.nodeid)
    if marker and report.when == "teardown":  # after the load has been counted
        _faults.append((*marker.args, rollouts.last, "FAILED" if item.nodeid in _failed else "as expected"))


def pytest_runtest_setup() -> None:
    rollouts.last = "no rollout"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _faults:
        return
    terminalreporter.write_line("")
    for what, expected, got, word in _faults:
        for name, text in ((word, what), ("expected:", expected), ("got:", got)):
            terminalreporter.write_line(f"{name:>11}  {text}")


@pytest.fixture(scope="session")
def password() -> Iterator[str]:
    """The vault's; while the tests run, the token is in one."""
    password, variables = rollouts.INVENTORY / ".vault-password", rollouts.INVENTORY / "group_vars/nox.yml"
    if not password.exists():
        password.touch(mode=0o600)
        password.write_text(secrets.token_hex(32))
    os.environ["ANSIBLE_VAULT_PASSWORD_FILE"] = rollouts.ENVIRONMENT["ANSIBLE_VAULT_PASSWORD_FILE"] = str(password)
    if not variables.read_text().startswith("$ANSIBLE_VAULT"):  # a run that was killed has left it so
        subprocess.run(["ansible-vault", "encrypt", variables], check=True, capture_output=True)
    yield password.read_text()
    subprocess.run(["ansible-vault", "decrypt", variables], check=True, capture_output=True)


@pytest.fixture(scope="session")
def token(password: str) -> str:
    words = ["ansible-vault", "view", rollouts.INVENTORY / "group_vars/nox.yml"]
    shown = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    return str(yaml.safe_load(shown)["nox_api_token"])


@pytest.fixture(scope="session", autouse=True)
def argument_lists(token: str, password: str) -> Iterator[None]:
    """The secrets in no process list, of this machine or of a host: this machine sees its hosts' processes, too."""
    found: list[str] = []
    over = threading.Event()

    def watch() -> None:
        asked: dict[str, int] = {}
        while not over.wait(0.05):
            asked = {name: asked.get(name, 0) + 1 for name in (path.name for path in Path("/proc").glob("[0-9]*"))}
            for name, times in asked.items():
                # a process has its parent's arguments until it has its own
                if times < 4 or times % 100 == 0:
                    with contextlib.suppress(OSError):
                        words = Path("/proc", name, "cmdline").read_bytes()
                        if token.encode() in words or password.encode() in words:
                            found.append(words.decode(errors="replace").replace("\0", " ")[:60])

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield
    over.set()
    watcher.join()
    assert not found, found[:3]


@pytest.fixture
def load(token: str) -> Iterator[None]:
    """Constant load through the edge while a test runs; not one request may fail."""
    edge = rollouts.machine("edge1").address
    running = subprocess.Popen(
        [sys.executable, rollouts.ROOT / "tests/load.py", "--url", f"https://{edge}"]
        + ["--ca", rollouts.INVENTORY / ".ca/edge1.edge.crt", "--workers", "4", "--pause", "0.1"],
        env={**os.environ, "NOX_TOKEN": token}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=120)
    told = json.loads(output)
    print(f"load: {output}", flush=True)
    rollouts.last += f"; {told['failed']} of {told['requests']} requests failed"
    assert told["requests"] > 50 and told["failed"] == 0, told
