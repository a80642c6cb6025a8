"""Two installed hosts, the playbooks, constant load on both, and the counts at the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import testinfra

INVENTORY = Path(os.environ["NOX_INVENTORY"])
PROJECT = Path(os.environ["ANSIBLE_CONFIG"]).parent
INVENTORIES = ["-i", str(INVENTORY), "-i", str(PROJECT / "molecule/lifecycle/inventory")]
HOSTS = ("nox1", "nox2")  # Caddy, Nginx
ROWS: list[tuple[str, str, dict[str, Any]]] = []


def play(verb: str, *options: str, wanted: int = 0, **variables: Any) -> str:
    """Runs a playbook of the project; its output."""
    command = ["ansible-playbook", *INVENTORIES, str(PROJECT / f"playbooks/{verb}.yml"), *options]
    done = subprocess.run([*command, "-e", json.dumps(variables)], capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == wanted, output
    return output


class Nox:
    """One host, and its service as a client on this side sees it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.host: Any = testinfra.get_host(f"ansible://{name}?ansible_inventory={INVENTORY}")
        self.ca = INVENTORY / f".ca/{name}.crt"
        listed = subprocess.run(["ansible-inventory", *INVENTORIES, "--host", name], capture_output=True, check=True)
        self.url = f"https://{json.loads(listed.stdout)['ansible_host']}"

    def run(self, command: str) -> str:
        return str(self.host.check_output(command))

    def token(self) -> str:
        return self.run("sed -n 's/^NOX_API_TOKEN=//p' /etc/default/nox-api")

    def release(self) -> str:
        return Path(self.run("readlink /opt/nox/current")).name

    def manifest(self) -> list[dict[str, str]]:
        found: list[dict[str, str]] = json.loads(self.run("cat /opt/nox/manifest.json"))
        return found

    def services(self) -> str:
        return self.run("systemctl show --property=MainPID nox-api nox-runner")

    def status(self, token: str, path: str = "/files") -> int:
        context = ssl.create_default_context(cafile=str(self.ca))
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {token}"})
        try:
            return int(urllib.request.urlopen(request, timeout=60, context=context).status)
        except urllib.error.HTTPError as error:
            return error.code

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON answer to a request with the token."""
        context = ssl.create_default_context(cafile=str(self.ca))
        headers = {"Authorization": f"Bearer {self.token()}", "Content-Type": "application/json"}
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=60, context=context) as answer:
            found: dict[str, Any] = json.loads(answer.read())
        return found

    def remembered_run(self, code: str) -> str:
        """The id of a run that is in the history, which is written behind the answer's back."""
        run = str(self.ask("/run_py", {"code": code})["run_id"])
        for _ in range(100):
            if self.status(self.token(), f"/history/{run}") == 200:
                return run
            time.sleep(0.1)
        raise AssertionError(f"{run} didn't come into the history of {self.name}")


@pytest.fixture(scope="session")
def noxes() -> list[Nox]:
    return [Nox(name) for name in HOSTS]


@contextmanager
def load(noxes: list[Nox], what: str) -> Iterator[list[dict[str, Any]]]:
    """Constant load on the hosts while the block runs; the counts are in the list afterwards."""
    counts: list[dict[str, Any]] = []
    running = [
        subprocess.Popen(
            [sys.executable, str(PROJECT / "tests/load.py"), "--url", one.url, "--ca", str(one.ca)]
            + ["--workers", "4", "--pause", "0.05"],
            env={**os.environ, "NOX_TOKEN": one.token()},
            stdout=subprocess.PIPE,
            text=True,
        )
        for one in noxes
    ]
    try:
        yield counts
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)
        for one, process in zip(noxes, running, strict=True):
            out, _ = process.communicate(timeout=120)
            counts.append(json.loads(out))
            ROWS.append((what, one.name, counts[-1]))


class Poll(threading.Thread):
    """A client that asks all the time, and notes every status; its token may be changed meanwhile."""

    def __init__(self, nox: Nox) -> None:
        super().__init__(daemon=True)
        self.nox, self.token, self.stopped, self.statuses = nox, nox.token(), threading.Event(), []  # type: ignore[var-annotated]

    def run(self) -> None:
        while not self.stopped.is_set():
            self.statuses.append(self.nox.status(self.token))
            time.sleep(0.05)

    def end(self) -> list[int]:
        self.stopped.set()
        self.join(90)
        return self.statuses


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Other releases: trees of the service with a file changed."""

    def make(name: str, path: str, old: str, new: str) -> str:
        place = tmp_path_factory.mktemp(name)
        for directory in ("app", "requirements"):
            ignored = shutil.ignore_patterns("__pycache__", "tests")
            shutil.copytree(PROJECT / directory, place / directory, ignore=ignored)
        file = place / "app" / path
        text = file.read_text()
        assert text.count(old) == 1
        file.write_text(text.replace(old, new))
        return str(place)

    return make


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not ROWS:
        return
    terminalreporter.write_line(f"\n{'under load':34}  host  requests  failed  slowest s")
    for what, host, count in ROWS:
        terminalreporter.write_line(
            f"{what:34}  {host}  {count['requests']:8}  {count['failed']:6}  {count['slowest']:9}"
        )
