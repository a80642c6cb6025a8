"""``make demo``: one lab host, Nox installed on it by its own playbook, real work done through its public door.

Where this machine can't host containers the same front and runner start on loopback, with the same sandbox.
The last three lines are for scripts: NOX_CA=, NOX_URL=, NOX_TOKEN=. Exit codes: 0 ok, 1 failed.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
INVENTORY = ROOT / "inventory/lab"
# The fallback's settings, logs and pids. The runner refuses to be root, so root's are where another user can reach them.
STATE = Path("/var/lib/nox-demo") if os.geteuid() == 0 else ROOT / ".run/demo"
UNPRIVILEGED = "nobody"
LAB = "lab"
PORT = 18080  # of the fallback; 8080 is often taken on a workstation

ANALYSIS = """\
import csv, statistics
from collections import defaultdict

rows = list(csv.DictReader(open("demo/requests.csv")))
by_region = defaultdict(list)
for row in rows:
    by_region[row["region"]].append(row)

print(f"{len(rows)} requests, {rows[0]['time']} to {rows[-1]['time']}")
print(f"{'region':8} {'requests':>8} {'errors':>7} {'p50 ms':>7} {'p95 ms':>7} {'MB':>7}")
for region, group in sorted(by_region.items()):
    times = sorted(float(row["ms"]) for row in group)
    errors = sum(row["status"][0] == "5" for row in group)
    size = sum(int(row["bytes"]) for row in group) / 1e6
    p95 = statistics.quantiles(times, n=20)[-1]
    print(f"{region:8} {len(group):8} {errors / len(group):7.1%} {statistics.median(times):7.1f} {p95:7.1f} {size:7.1f}")
"""
PIPELINE = (
    "cut -d, -f3,5 demo/requests.csv | tail -n +2 | grep ',5' | cut -d, -f1 | sort | uniq -c | sort -rn | head -5"
)


class DemoError(Exception):
    """The demo can't go on; the message says what helps."""


@dataclass(frozen=True)
class Service:
    """A living Nox: where it is, what opens it, and what proves that it is it ("" without TLS)."""

    url: str
    token: str
    ca: str

    def call(self, method: str, path: str, body: bytes = b"", kind: str = "") -> tuple[int, Any]:
        """One request → (status, decoded JSON). Connection problems raise URLError."""
        request = urllib.request.Request(self.url + path, data=body or None, method=method)
        request.add_header("Authorization", f"Bearer {self.token}")
        if kind:
            request.add_header("Content-Type", kind)
        context = ssl.create_default_context(cafile=self.ca) if self.ca else None
        try:
            with urllib.request.urlopen(request, timeout=60, context=context) as response:
                return response.status, json.loads(response.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")

    def run(self, path: str, **spec: str) -> dict[str, Any]:
        """POST /run_py or /run_sh; raises DemoError unless the run ended with status ok."""
        status, answer = self.call("POST", path, json.dumps(spec).encode(), "application/json")
        if status != 200 or answer["status"] != "ok":
            raise DemoError(f"{path} answered {status}: {answer}")
        return dict(answer)

    def put(self, path: str, data: bytes) -> dict[str, Any]:
        """POST /put, overwriting; raises DemoError unless it was stored."""
        edge = uuid.uuid4().hex
        fields = "".join(
            f'--{edge}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in (("path", path), ("overwrite", "true"))
        )
        head = f'--{edge}\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
        body = (fields + head).encode() + data + f"\r\n--{edge}--\r\n".encode()
        status, answer = self.call("POST", "/put", body, f"multipart/form-data; boundary={edge}")
        if status != 201:
            raise DemoError(f"/put answered {status}: {answer}")
        return dict(answer)


def say(text: str) -> None:
    print(text, flush=True)


@contextmanager
def step(title: str) -> Iterator[None]:
    say(f"\n── {title}")
    started = time.monotonic()
    yield
    say(f"   {title}: done in {time.monotonic() - started:.1f} s")


def command(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=ROOT, text=True, **options)


# ── On a lab host


def install_on_lab_host() -> Service:
    with step("boot a systemd host"):
        up = command(sys.executable, "-m", "lab", "up", f"--lab={LAB}", f"--inventory={INVENTORY}")
        if up.returncode != 0:
            raise DemoError("the lab host did not come up, see above")
    with step("install Nox on it with playbooks/install.yml"):
        playbook = Path(sys.executable).with_name("ansible-playbook")
        done = command(str(playbook), "-i", str(INVENTORY), "playbooks/install.yml")
        if done.returncode != 0:
            raise DemoError("the playbook failed, see above")
    token = command(
        *(sys.executable, "-m", "lab", "ssh", f"--lab={LAB}", "nox1"),
        *("sed", "-n", "s/^NOX_API_TOKEN=//p", "/etc/default/nox-api"),
        capture_output=True,
    ).stdout.strip()
    inventory = command(
        str(Path(sys.executable).with_name("ansible-inventory")),
        *("-i", str(INVENTORY), "--host", "nox1"),
        capture_output=True,
    )
    address = json.loads(inventory.stdout)["ansible_host"]
    return Service(f"https://{address}", token, str(INVENTORY / ".ca/nox1.crt"))


# ── Without a host: front and runner on loopback


def start_on_loopback(reason: str) -> Service:
    say(f"This machine can't host containers ({reason}); front and runner start on loopback instead.")
    STATE.mkdir(parents=True, exist_ok=True)
    STATE.chmod(0o700)
    hand_over(STATE)
    settings, sandbox = STATE / "settings", STATE / "sandbox"
    if settings.exists():
        known = dict(line.split("=", 1) for line in settings.read_text().splitlines())
        service = Service(f"http://127.0.0.1:{known['NOX_PORT']}", known["NOX_API_TOKEN"], "")
        if answers(service):
            return service
    end_processes()  # of a start that came to nothing
    sandbox.mkdir(exist_ok=True)
    settings.touch(mode=0o600)
    port, token = free_port(), secrets.token_hex(32)
    settings.write_text(f"NOX_API_TOKEN={token}\nNOX_PORT={port}\nNOX_SANDBOX={sandbox}\n")
    hand_over(settings, sandbox)
    service = Service(f"http://127.0.0.1:{port}", token, "")
    with step("install the service's dependencies"):
        python = service_python()
    require_bubblewrap()
    with step("start front and runner"):
        door = STATE / "runner.sock"
        door.unlink(missing_ok=True)
        base = [str(python), "-m"]
        flags = ["--settings", str(settings)]
        spawn(
            "runner",
            [*base, "nox_runner", *flags, "--socket", str(door), "--client-user", "self"],
        )
        front = ["--runner-socket", str(door), "--log-dir", str(STATE)]
        spawn("front", [*base, "nox_api", *flags, *front])
        until = time.monotonic() + 20
        while not answers(service):
            if time.monotonic() > until:
                tail = "\n".join((STATE / "front.out").read_text().splitlines()[-10:])
                raise DemoError(f"the service did not answer within 20 s; its last words:\n{tail}")
            time.sleep(0.1)
    return service


def free_port() -> int:
    """The usual port, or any other where somebody has that one."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", PORT))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(service: Service) -> bool:
    try:
        status, health = service.call("GET", "/health")
    except (urllib.error.URLError, OSError, ValueError):
        return False
    return status == 200 and health.get("status") == "ok"


def hand_over(*paths: Path) -> None:
    """Give files to the user that the service runs as, where that isn't us."""
    if os.geteuid() == 0:
        for path in paths:
            shutil.chown(path, UNPRIVILEGED)


def service_python() -> Path:
    """A virtual environment with the service's locked dependencies, made once."""
    venv = STATE / "venv"
    python = venv / "bin/python"
    base = Path(sys.executable).resolve()
    if os.geteuid() == 0 and not all(parent.stat().st_mode & 0o001 for parent in base.parents):
        base = Path("/usr/bin/python3").resolve()  # our own is in a home that the service's user can't enter
    version = base.name.removeprefix("python")
    lock = ROOT / f"requirements/app-py{version}.lock"
    if not lock.exists():
        raise DemoError(f"no lock for Python {version}: {lock.name} is missing (make lock)")
    if not (venv / "complete").exists():
        shutil.rmtree(venv, ignore_errors=True)
        command(str(base), "-m", "venv", "--without-pip", str(venv), check=True)
        pip = (sys.executable, "-m", "pip", "--python", str(python), "install", "-q")
        command(*pip, "--require-hashes", "-r", str(lock), check=True)
        (venv / "complete").touch()
    shutil.copytree(ROOT / "app", STATE / "app", dirs_exist_ok=True)
    return python


def require_bubblewrap() -> None:
    if shutil.which("bwrap"):
        return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        with step("apt-get install bubblewrap"):
            command("apt-get", "update", "-q", check=True, stdout=subprocess.DEVNULL)
            command(
                "apt-get",
                "install",
                "-q",
                "-y",
                "bubblewrap",
                check=True,
                stdout=subprocess.DEVNULL,
            )
        return
    raise DemoError("bubblewrap is missing: sudo apt-get install bubblewrap")


def spawn(name: str, words: list[str]) -> None:
    """Starts a process that outlives us; `make demo-down` ends it by its pid."""
    with (STATE / f"{name}.out").open("wb") as output:
        process = subprocess.Popen(
            words,
            cwd=STATE,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(STATE / "app"), "LANG": "C.UTF-8"},
            user=UNPRIVILEGED if os.geteuid() == 0 else None,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    (STATE / f"{name}.pid").write_text(f"{process.pid}\n")


def end_processes() -> None:
    """Ends front and runner of an earlier start, by the pids it wrote down."""
    for name in ("front", "runner"):
        record = STATE / f"{name}.pid"
        if record.exists():
            pid = int(record.read_text())
            try:
                ours = b"nox_" in Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                ours = False
            if ours:
                os.kill(pid, signal.SIGTERM)
            record.unlink()


def stop() -> None:
    """Ends what a demo left running, on a host or on loopback."""
    end_processes()
    shutil.rmtree(STATE, ignore_errors=True)
    if os.geteuid() == 0:
        command(sys.executable, "-m", "lab", "down", f"--lab={LAB}", "nox1")


# ── The work


def requests_csv(rows: int = 5000) -> bytes:
    """A day of web requests, the same ones every time. Columns: time, region, path, ms, status, bytes."""
    dice = random.Random(42)  # noqa: S311  data, not secrets
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["time", "region", "path", "ms", "status", "bytes"])
    slow = {"eu": 1.0, "us": 1.6, "asia": 2.3}
    for i in range(rows):
        second = i * 86400 // rows
        region = dice.choice(sorted(slow))
        path = dice.choice(["/", "/login", "/search", "/cart", "/api/items", "/static/app.js"])
        ms = dice.lognormvariate(3.2, 0.6) * slow[region] * (3 if path == "/search" else 1)
        status = dice.choices([200, 304, 404, 500, 503], [88, 6, 3, 2, 1])[0]
        clock = f"{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}"
        table.writerow([clock, region, path, f"{ms:.1f}", status, dice.randrange(200, 60000)])
    return out.getvalue().encode()


def show_work(service: Service) -> None:
    data = requests_csv()
    stored = service.put("demo/requests.csv", data)
    say(f"\n── POST /put: {stored['path']}, {stored['size']} bytes, sha256 {stored['sha256'][:16]}…")
    result = service.run("/run_py", code=ANALYSIS)
    say(f"\n── POST /run_py: an analysis of it ({result['duration_ms']:.0f} ms)")
    say(indented(result["stdout"]))
    result = service.run("/run_sh", cmd=PIPELINE)
    say(f"── POST /run_sh: {PIPELINE} ({result['duration_ms']:.0f} ms)")
    say(indented(result["stdout"]))


def indented(text: str) -> str:
    return "".join(f"   {line}\n" for line in text.splitlines())


def main(arguments: list[str]) -> int:
    if arguments == ["--stop"]:
        stop()
        return 0
    if arguments:
        say(f"usage: python -m lab.demo [--stop]\n{__doc__}")
        return 0 if arguments == ["--help"] else 2
    started = time.monotonic()
    check = command(sys.executable, "-m", "lab", "check", capture_output=True)
    try:
        if check.returncode == 4:
            service = start_on_loopback((check.stdout + check.stderr).strip().splitlines()[-1])
        else:
            service = install_on_lab_host()
        show_work(service)
    except (DemoError, urllib.error.URLError, subprocess.CalledProcessError) as error:
        say(f"\ndemo failed: {error}")
        return 1
    say(f"Nox is running ({time.monotonic() - started:.0f} s). It stays until `make demo-down`. Try:")
    say(
        '  curl --cacert "$NOX_CA" -H "Authorization: Bearer $NOX_TOKEN" -H "Content-Type: application/json" '
        '-d \'{"code":"print(6*7)"}\' "$NOX_URL/run_py"\n'
    )
    say(f"NOX_CA={service.ca}\nNOX_URL={service.url}\nNOX_TOKEN={service.token}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
