"""The two real processes on loopback, as the product runs them: unprivileged, with real bwrap."""

from __future__ import annotations

import fcntl
import functools
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

APP = Path(__file__).resolve().parent.parent
TOKEN = secrets.token_hex(32)
USER = "nobody"
BACKEND = os.environ.get("NOX_TEST_BACKEND", "auto")
"""For services whose test does not say."""
_PATIENCE = 60.0


def as_user(*command: str) -> list[str]:
    """`command`, run by an unprivileged user if this is root."""
    if os.getuid() != 0:
        return list(command)
    group = pwd.getpwnam(USER).pw_gid
    return ["setpriv", "--reuid", USER, "--regid", str(group), "--clear-groups", *command]


def environment() -> dict[str, str]:
    """What the services are started with."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1"}


@functools.cache
def why_not() -> str:
    """Why the services cannot run here; empty if they can."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        return "bubblewrap is not installed: apt-get install bubblewrap"
    if not os.path.exists("/usr/bin/python3"):
        return "there is no /usr/bin/python3 for the sandbox"
    trial = subprocess.run(
        as_user(bwrap, "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "true"),
        capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    if trial.returncode != 0:
        return f"bubblewrap does not work here: {trial.stderr.strip()}"
    trial = subprocess.run(
        as_user(sys.executable, "-c", "import fastapi, uvicorn"),
        capture_output=True, text=True, timeout=120, env=environment(), cwd=APP,
    )  # fmt: skip
    if trial.returncode != 0:
        return f"{USER} cannot use {sys.executable}: {trial.stderr.strip()[-200:]}"
    return ""


def wait_for(condition: Any, what: str, seconds: float = _PATIENCE) -> Any:
    """Ask `condition` until it gives something true, which is returned."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} did not come within {seconds} s"
        time.sleep(0.02)
    return found


class Service:
    """A front and a runner of their own, with a sandbox, settings and logs of their own."""

    home = "/tmp"
    """Where all that is made. Below /tmp the sandbox is covered by a run's own, and bound again."""

    def __init__(self, **settings: object) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="nox-test-", dir=self.home))
        self.root.chmod(0o755)
        self.sandbox = self.root / "home" / "sandbox"
        self.logs = self.root / "logs"
        self.run = self.root / "run"
        self.history = self.root / "history"
        for directory in (self.sandbox, self.logs, self.run, self.history):
            directory.mkdir(parents=True)
            if os.getuid() == 0:
                shutil.chown(directory, USER)
        self.socket = self.run / "runner.sock"
        self.front_settings = self.root / "front.settings"
        self.runner_settings = self.root / "runner.settings"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.settings: dict[str, object] = {
            "NOX_PORT": self.port, "NOX_SANDBOX": self.sandbox, "NOX_TIMEOUT": 5, "NOX_SLOTS": 4,
            # So that what others take of this disk meanwhile is nobody's fault here.
            "NOX_QUOTA_BYTES": "100G", "NOX_BACKEND": BACKEND, **settings,
        }  # fmt: skip
        self.token = TOKEN
        self.write_settings()
        self.runner: subprocess.Popen[bytes] | None = None
        self.front: subprocess.Popen[bytes] | None = None

    def write_settings(self, **changes: object) -> None:
        self.settings.update(changes)
        text = "".join(f"{key}={value}\n" for key, value in self.settings.items())
        self.runner_settings.write_text(text)
        self.front_settings.write_text(f"{text}NOX_API_TOKEN={self.token}\n")
        for path in (self.runner_settings, self.front_settings):
            if os.getuid() == 0:
                shutil.chown(path, USER)
            path.chmod(0o600)

    def start(self, *runner_options: str) -> Service:
        self.start_runner(*runner_options)
        self.start_front()
        return self

    def start_runner(self, *options: str) -> None:
        before = self.runner_log().count('"ready"')
        self.runner = self._spawn(
            "nox_runner", "--settings", str(self.runner_settings), "--socket", str(self.socket),
            "--client-user", "self", *options,
        )  # fmt: skip
        wait_for(lambda: self.runner_log().count('"ready"') > before, "the runner")

    def start_front(self, env: dict[str, str] | None = None, passed: Sequence[int] = ()) -> None:
        """With `env`, it waits for nothing: who plays systemd is told."""
        self.front = self._spawn(
            "nox_api", "--settings", str(self.front_settings), "--runner-socket",
            str(self.socket), "--log-dir", str(self.logs), "--history-dir", str(self.history),
            env=env, passed=passed,
        )  # fmt: skip
        if env is None:
            wait_for(lambda: '"ready"' in self.front_log(), "the front")

    def _spawn(
        self,
        module: str,
        *options: str,
        env: dict[str, str] | None = None,
        passed: Sequence[int] = (),
    ) -> subprocess.Popen[bytes]:
        # As systemd does: descriptors from 3 on, and the pid that is to use them.
        passing = (
            "import os, sys; os.environ['LISTEN_PID'] = str(os.getpid()); "
            "os.execv(sys.argv[1], sys.argv[1:])"
        )

        def place() -> None:
            high = [fcntl.fcntl(one, fcntl.F_DUPFD, 100) for one in passed]
            for number, one in enumerate(high, 3):
                os.dup2(one, number)

        command = as_user(sys.executable, "-c", passing, sys.executable, "-m", module, *options)
        with open(self.root / f"{module}.stderr", "ab") as stderr:
            return subprocess.Popen(
                command, cwd=APP, env={**environment(), **(env or {})}, stderr=stderr,
                stdin=subprocess.DEVNULL, preexec_fn=place,
                pass_fds=range(3, 3 + len(passed)),
            )  # fmt: skip

    def runner_log(self) -> str:
        path = self.root / "nox_runner.stderr"
        return path.read_text() if path.exists() else ""

    def front_log(self) -> str:
        path = self.logs / "nox-api.log"
        return path.read_text() if path.exists() else ""

    def client(self, token: str | None = None, timeout: float = 30) -> httpx.Client:
        headers = {"Authorization": f"Bearer {token or self.token}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=timeout)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def python(self, code: str, **fields: Any) -> dict[str, Any]:
        return self.post("/run_py", code=code, **fields)

    def shell(self, cmd: str, **fields: Any) -> dict[str, Any]:
        return self.post("/run_sh", cmd=cmd, **fields)

    def post(self, path: str, **fields: Any) -> dict[str, Any]:
        with self.client() as client:
            response = client.post(path, json=fields)
        assert response.status_code == 200, response.text
        result: dict[str, Any] = response.json()
        return result

    def put(self, path: str, content: bytes, **fields: str) -> httpx.Response:
        with self.client() as client:
            data = {"path": path, **fields}
            return client.post("/put", files={"file": ("f", content)}, data=data)

    def detail(self) -> dict[str, Any]:
        with self.client() as client:
            found: dict[str, Any] = client.get("/health").json()
        return found

    def stop(self) -> None:
        for process in (self.front, self.runner):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        shutil.rmtree(self.root, ignore_errors=True)


def running(*parts: str) -> Iterator[int]:
    """The pids of processes whose command line holds all of `parts`."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            line = Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, UnicodeDecodeError):
            continue
        if all(part in line for part in parts):
            yield int(pid)


def parent(pid: int) -> int:
    """The pid of a process's parent; 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return 0


def resident(pid: int) -> int:
    """Bytes of memory that the process has resident."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
