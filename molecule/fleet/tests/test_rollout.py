"""Rollouts on a living fleet, under constant load through its edge. The tests build on each other, in this order."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
INVENTORY = Path(os.environ["NOX_INVENTORY"])
LAB = f"m-{os.environ['MOLECULE_SCENARIO_NAME']}"
HOSTS = [name for name in os.environ["NOX_HOSTS"].split(",") if not name.startswith("edge")]
STATE = INVENTORY / ".state"  # hidden: Ansible reads every other file of an inventory's directory
TARGET = "3.11 x86_64"
ENVIRONMENT = {**os.environ, "NOX_STATE_DIR": str(STATE), "COLUMNS": "200"}

# Where each release differs from the one before: text added to nox_api/__init__.py.
RELEASES = {
    "0.2.0": "",
    "0.3.0": 'raise SystemExit("this release is broken")\n',
    "0.4.0": "import os, threading, time\n"
    "threading.Thread(target=lambda: (time.sleep(25), os._exit(3)), daemon=True).start()\n",
    "0.5.0": "",
}


def noxctl(*words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "noxctl", *words], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    print(f"$ noxctl {' '.join(words)}\n{done.stderr}{done.stdout}exit {done.returncode}", flush=True)
    return done


def rollout(bundle: Path, *words: str) -> tuple[int, dict[str, Any]]:
    done = noxctl("rollout", str(bundle), "-i", str(INVENTORY), "--yes", "--json", *words)
    return done.returncode, json.loads(done.stdout)


def states(result: dict[str, Any]) -> dict[str, str]:
    return {one["host"]: one["state"] for one in result["hosts"]}


def fleet() -> dict[str, dict[str, Any]]:
    done = noxctl("status", "-i", str(INVENTORY), "--json")
    return {one["host"]: one for one in json.loads(done.stdout)}


def versions() -> dict[str, str]:
    return {host: one["version"] for host, one in fleet().items()}


def on(host: str, command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "lab", "ssh", "--lab", LAB, host, "--", command],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout


@pytest.fixture(scope="module")
def token() -> str:
    text = (INVENTORY / "group_vars/nox.yml").read_text()
    return text.split()[1]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Version → bundle; made from copies of the service's sources, by the command an operator would use."""
    place, found = tmp_path_factory.mktemp("bundles"), {}
    for version, addition in RELEASES.items():
        tree = place / version
        shutil.copytree(ROOT / "app", tree / "app", ignore=shutil.ignore_patterns("__pycache__", ".*"))
        shutil.copytree(ROOT / "requirements", tree / "requirements")
        project = tree / "app/pyproject.toml"
        project.write_text(re.sub(r'(?m)^version = "[^"]+"', f'version = "{version}"', project.read_text()))
        about = tree / "app/nox_runner/__init__.py"
        about.write_text(re.sub(r'__version__ = "[^"]+"', f'__version__ = "{version}"', about.read_text()))
        with (tree / "app/nox_api/__init__.py").open("a") as handle:
            handle.write(addition)
        out = place / f"{version}.bundle"
        assert noxctl("bundle", "--app", str(tree / "app"), "--out", str(out), "--target", TARGET).returncode == 0
        found[version] = out
    return found


@pytest.fixture
def load(token: str) -> Iterator[None]:
    """Constant load through the edge while a test runs; not one request may fail."""
    edge = json.loads(
        subprocess.run(
            ["ansible-inventory", "-i", str(INVENTORY), "--host", "edge1"], capture_output=True, text=True, check=True
        ).stdout
    )["ansible_host"]
    running = subprocess.Popen(
        [sys.executable, ROOT / "tests/load.py", "--url", f"https://{edge}", "--ca", INVENTORY / ".ca/edge1.edge.crt"]
        + ["--workers", "4", "--pause", "0.1"],
        env={**os.environ, "NOX_TOKEN": token}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=120)
    print(f"load: {output}")
    told = json.loads(output)
    assert told["requests"] > 50 and told["failed"] == 0, told


def test_all_are_healthy_before() -> None:
    found = fleet()
    assert sorted(found) == sorted(HOSTS)
    for one in found.values():
        assert one["reachable"] and one["healthy"] and one["drift"] == "clean", one
        assert one["version"] and one["release"].startswith(one["version"])


def test_a_good_release_reaches_everybody_and_no_request_is_lost(bundles: dict[str, Path], load: None) -> None:
    code, result = rollout(bundles["0.2.0"], "--soak", "3")
    assert (code, result["outcome"]) == (0, "done")
    assert set(states(result).values()) == {"done"}
    assert set(versions().values()) == {"0.2.0"}


def test_a_second_time_there_is_nothing_to_do(bundles: dict[str, Path]) -> None:
    code, result = rollout(bundles["0.2.0"])
    assert code == 0 and set(states(result).values()) == {"already"}


def test_a_release_that_crashes_never_reaches_a_second_host(bundles: dict[str, Path], load: None) -> None:
    code, result = rollout(bundles["0.3.0"], "--canary", HOSTS[1])
    assert (code, result["outcome"]) == (5, "stopped")
    bad = next(one for one in result["hosts"] if one["host"] == HOSTS[1])
    assert bad["state"] == "failed" and "this release is broken" in bad["error"]
    assert bad["release_after"] == bad["release_before"]
    assert [state for host, state in states(result).items() if host != HOSTS[1]] == ["waiting"] * (len(HOSTS) - 1)
    after = fleet()
    assert {one["version"] for one in after.values()} == {"0.2.0"} and all(one["healthy"] for one in after.values())
    # code that can't even be loaded is never switched to
    assert not [host for host in HOSTS if "0.3.0" in on(host, "cat /opt/nox/manifest.json")]


def test_a_release_that_fails_later_goes_back_from_the_gate(bundles: dict[str, Path]) -> None:
    # Without load: a front that crashes takes the requests with it that it was just answering.
    code, result = rollout(bundles["0.4.0"], "--soak", "30")
    assert (code, result["outcome"]) == (5, "stopped")
    assert states(result)[HOSTS[0]] == "rolled back"
    assert sorted(states(result).values()) == ["rolled back"] + ["waiting"] * (len(HOSTS) - 1)
    assert set(versions().values()) == {"0.2.0"}


def test_a_lost_host_is_counted_and_caught_up_with_later(bundles: dict[str, Path], load: None) -> None:
    lost = HOSTS[-1]
    # It comes back by itself: from outside nobody can tell it to.
    on(
        lost,
        "systemd-run --quiet --on-active=120 systemctl start ssh.service; systemctl stop ssh.service; pkill -f 'sshd: '",
    )
    try:
        code, result = rollout(bundles["0.5.0"], "--waves", "1,100%", "--budget", "1", "--soak", "1")
        assert (code, result["outcome"]) == (6, "done")
        assert {host for host, state in states(result).items() if state == "unreachable"} == {lost}
        assert [state for host, state in states(result).items() if host != lost] == ["done"] * (len(HOSTS) - 1)
    finally:
        deadline = time.time() + 240
        while not fleet()[lost]["reachable"]:
            assert time.time() < deadline, f"{lost} didn't come back"
            time.sleep(5)
    code, result = rollout(bundles["0.5.0"], "--soak", "1")
    assert code == 0 and states(result)[lost] == "done"
    assert [state for host, state in states(result).items() if host != lost] == ["already"] * (len(HOSTS) - 1)


def test_a_killed_controller_goes_on_where_it_was(bundles: dict[str, Path], load: None) -> None:
    words = ["rollout", str(bundles["0.2.0"]), "-i", str(INVENTORY), "--yes", "--soak", "1", "--waves", "1,1,100%"]
    first = subprocess.Popen(
        [sys.executable, "-m", "noxctl", *words], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    for line in first.stdout:
        print(line, end="")
        if "wave 1: upgrade" in line:
            break
    # meanwhile nobody else may
    second = noxctl(*words)
    assert second.returncode == 7 and f"pid {first.pid}" in second.stderr
    first.kill()
    first.wait()
    other = noxctl("rollout", str(bundles["0.5.0"]), "-i", str(INVENTORY), "--yes", "--resume")
    assert other.returncode == 2 and "another bundle" in other.stderr
    deadline = (
        time.time() + 120
    )  # Ansible may still be at work, as after a real crash; its lock on the host's files ends with it
    while (
        time.time() < deadline
        and subprocess.run(["pgrep", "-f", str(INVENTORY) + ".*upgrade.yml"], stdout=subprocess.DEVNULL).returncode == 0
    ):
        time.sleep(0.5)
    code, result = rollout(bundles["0.2.0"], "--resume", "--soak", "1")
    assert (code, result["outcome"]) == (0, "done")
    assert states(result)[HOSTS[0]] == "done" and set(states(result).values()) <= {"done", "already"}
    assert set(versions().values()) == {"0.2.0"}
    # the canary was not changed a second time
    assert on(HOSTS[0], "cat /opt/nox/manifest.json").count('"release": "0.2.0') == 2


def test_a_script_runs_everywhere(tmp_path: Path) -> None:
    script = tmp_path / "sum.py"
    script.write_text("import sys; print(sum(int(word) for word in sys.argv[1:]))")
    done = noxctl("run", str(script), "-i", str(INVENTORY), "--json", "--", "20", "22")
    assert {one["host"]: one["result"]["stdout"] for one in json.loads(done.stdout)} == dict.fromkeys(HOSTS, "42\n")


def test_reports_and_the_secret_is_nowhere(token: str, tmp_path: Path) -> None:
    for run in json.loads(noxctl("runs", "--json").stdout):
        assert noxctl("report", run["id"], "--out", str(tmp_path / f"{run['id']}.html")).returncode == 0
    texts = [path for place in (STATE, tmp_path) for path in place.rglob("*") if path.is_file()]
    assert len(texts) > 5
    assert not [path for path in texts if token.encode() in path.read_bytes()]
