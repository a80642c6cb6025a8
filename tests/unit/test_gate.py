"""The gate of a host, on this machine: its smoke tests are a script of ours, its service a process of ours."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.nox.platform.plugins.module_utils import host_gate


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A unit that is up; systemd tells of its process, or that it is another one."""
    process = subprocess.Popen(["sleep", "60"])
    threading.Thread(target=process.wait).start()  # as systemd: nothing of it is left when it has ended

    def shown(names: list[str]) -> dict[str, dict[str, str]]:
        state = "active" if Path("/proc", str(process.pid)).exists() else "failed"
        return {name: {"ActiveState": state, "SubState": "-", "MainPID": str(process.pid)} for name in names}

    monkeypatch.setattr(host_gate, "show", shown)
    monkeypatch.setattr(host_gate, "last_words", lambda names: f"journal of {names[0]}")
    yield process
    process.kill()
    process.wait()


def gate(monkeypatch: pytest.MonkeyPatch, place: Path, script: str, **options: Any) -> dict[str, Any]:
    (place / "smoke.sh").write_text(script)
    monkeypatch.setattr(host_gate, "SMOKE", str(place / "smoke.sh"))
    monkeypatch.setattr(host_gate, "LEAD", 0.2)
    defaults = {
        "url": "https://nox",
        "ca": "",
        "units": ["nox.service"],
        "seconds": 0,
        "release": "",
        "check_mode": False,
    }
    return host_gate.answer({**defaults, "root": str(place), "record": str(place / "none"), **options})


def test_a_host_that_passes(service: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun = time.monotonic()
    found = gate(monkeypatch, tmp_path, 'echo "ok $NOX_URL"; date +%s.%N > "${0%/*}/began"', seconds=1)
    assert found == {"changed": False, "report": ["ok https://nox"]}
    assert time.monotonic() - begun >= 1, "it was watched for as long as was asked"


@pytest.mark.parametrize("seconds", [0, 20])
def test_failed_tests_are_told_at_once(
    service: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seconds: float
) -> None:
    monkeypatch.setattr(host_gate, "LEAD", 20)
    script = f"echo 'ok   a'; echo 'FAIL b'; echo '{' ' * 17}the reason'; echo 'smoke: 1 failed'; exit 1"
    (tmp_path / "smoke.sh").write_text(script)
    monkeypatch.setattr(host_gate, "SMOKE", str(tmp_path / "smoke.sh"))
    begun = time.monotonic()
    options = {"url": "u", "ca": "", "units": ["nox.service"], "seconds": seconds, "release": "", "check_mode": False}
    assert host_gate.answer(options) == {"failed": True, "msg": "The smoke tests failed: FAIL b; the reason"}
    assert time.monotonic() - begun < 10


def test_a_service_that_ends_is_told_at_once_and_the_tests_are_ended(
    service: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = f"trap 'echo ended > {tmp_path}/ended; exit 130' TERM; kill {service.pid}; sleep 30 & wait"
    begun = time.monotonic()
    found = gate(monkeypatch, tmp_path, script)
    assert found["failed"] and "nox.service is failed" in found["msg"] and "journal of nox.service" in found["msg"]
    assert (tmp_path / "ended").exists() and time.monotonic() - begun < 10


def test_a_service_with_another_process_was_restarted(
    service: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pids = iter([str(service.pid), "1"])
    monkeypatch.setattr(
        host_gate, "show", lambda names: {"nox.service": {"ActiveState": "active", "MainPID": next(pids)}}
    )
    assert "nox.service was restarted while it was watched" in gate(monkeypatch, tmp_path, "echo ok")["msg"]


def test_without_tests_on_the_host(service: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = gate(monkeypatch, tmp_path, "echo 'smoke: no target' >&2; exit 2")
    assert found["msg"] == "The smoke tests failed: smoke: no target"


def test_check_mode_tests_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = gate(monkeypatch, tmp_path, "exit 1", check_mode=True)
    assert found == {"changed": False, "report": []}
