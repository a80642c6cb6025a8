"""nox_packages beside an apt that only pretends: what is left in the background is waited for, and told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DPKG = """#!/bin/sh
cd {place}; for name in $(ls installed); do echo "$name installed"; done
"""
# Installs when it is let: a test holds it back with a file.
APT = """#!/bin/sh
cd {place}; echo "$@" >> calls
case "$*" in
*--simulate*) echo "Inst thing (1.0)"; exit 0 ;;
*install*) while [ -e wait ]; do sleep 0.05; done; [ ! -e broken ] || {{ echo "no space left" >&2; exit 100; }}; touch installed/thing ;;
esac
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "installed").mkdir()
    for name, text in (("dpkg-query", DPKG), ("apt-get", APT)):
        (tmp_path / name).write_text(text.format(place=tmp_path))
        (tmp_path / name).chmod(0o755)
    return tmp_path


def ran(place: Path, apart: bool = False, check: bool = False) -> dict[str, Any]:
    arguments = {"name": ["thing"], "apart": apart, "_ansible_check_mode": check}
    code = (
        "from ansible.module_utils.testing import patch_module_args; import sys, json, pathlib; "
        "from ansible_collections.nox.platform.plugins.modules import nox_packages as m\n"
        "from ansible_collections.nox.platform.plugins.module_utils import brought\n"
        f"m.ANSWER = pathlib.Path({str(place / 'answer')!r}); brought.PATH = pathlib.Path({str(place / 'brought')!r})\n"
        "with patch_module_args(json.load(sys.stdin)): m.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(arguments),
        env={**os.environ, "PYTHONPATH": str(ROOT / ".collections"), "PATH": f"{place}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def calls(place: Path) -> list[str]:
    """What apt was asked to install, apart from what it would."""
    path = place / "calls"
    return [line for line in path.read_text().splitlines() if "--simulate" not in line] if path.exists() else []


def test_what_is_begun_apart_is_waited_for_and_told(place: Path) -> None:
    (place / "wait").touch()
    begun = ran(place, apart=True)
    assert begun["apart"] and not begun["changed"] and begun["present"] == ["thing"]
    assert not (place / "installed/thing").exists()
    (place / "wait").unlink()
    told = ran(place)
    assert told["changed"] and told["installed"] == ["thing"] and not told["apart"]
    assert json.loads((place / "brought").read_text()) == {"packages": ["thing"]}, "uninstall knows of it"
    assert len(calls(place)) == 1, "apt has installed once"
    again = ran(place, apart=True)
    assert not again["changed"] and not again["apart"], "nothing to begin, nothing to wait for"


def test_its_failure_is_the_failure_of_who_waits(place: Path) -> None:
    (place / "broken").touch()
    assert ran(place, apart=True)["apart"]
    told = ran(place)
    assert told["failed"] and "apt can't install thing: no space left" in told["msg"]
    (place / "broken").unlink()
    assert ran(place)["changed"], "and is told once"


def test_one_that_was_killed_is_done_again(place: Path) -> None:
    (place / "wait").touch()
    assert ran(place, apart=True)["apart"]
    end = time.monotonic() + 10
    while not calls(place):
        assert time.monotonic() < end
        time.sleep(0.05)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(place).encode() in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue
    (place / "wait").unlink()
    told = ran(place)
    assert told["changed"] and told["installed"] == ["thing"]


def test_check_mode_begins_nothing(place: Path) -> None:
    told = ran(place, apart=True, check=True)
    assert told["changed"] and not told["apart"] and told["present"] == ["thing"]
    assert not (place / "installed/thing").exists() and not (place / "answer").exists()
