"""A host's own copy of the check: asked where it is the very one that would be sent, and nowhere else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.nox.platform.plugins.action.nox_state import ActionModule
from ansible_collections.nox.platform.plugins.module_utils import host_state
from ansible_collections.nox.platform.plugins.plugin_utils import on_host


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package, as role nox_tools leaves it on a host."""
    place = tmp_path / "share/host_state"
    place.mkdir(parents=True)
    for name in host_state.PACKAGE:
        shutil.copy(on_host.START if name == "__init__" else on_host.HERE / f"{name}.py", place / f"{name}.py")
    monkeypatch.setattr(on_host, "THERE", place)
    on_host.digests.cache_clear()
    yield place
    on_host.digests.cache_clear()


class Action:
    """As much of a task as is asked: it runs on this machine what would be run on the host."""

    def __init__(self, answer: str | None = None) -> None:
        self.answer = answer

    def _low_level_execute_command(self, command: str) -> dict[str, Any]:
        if self.answer is not None:
            return {"rc": 0, "stdout": self.answer}
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
        return {"rc": done.returncode, "stdout": done.stdout}


def asked(action: Action, record: Path, python: str = sys.executable) -> dict[str, Any] | None:
    return on_host.ask(action, {"ansible_python_interpreter": python}, "host_state", str(record))  # type: ignore[arg-type]


def test_it_says_what_the_module_would(there: Path, tmp_path: Path) -> None:
    found = asked(Action(), tmp_path / "none")
    assert found == host_state.answer(str(tmp_path / "none"))
    assert not (there / "__pycache__").exists(), "its bytecode lies elsewhere, by the sources' digest"


@pytest.mark.parametrize("name", ["__init__", "host_state", "settings_file"])
def test_an_altered_or_missing_file_is_not_believed(there: Path, tmp_path: Path, name: str) -> None:
    path = there / f"{name}.py"
    path.write_text(path.read_text() + "\n# edited\n")
    assert asked(Action(), tmp_path / "none") is None
    path.unlink()
    assert asked(Action(), tmp_path / "none") is None


def test_bytecode_that_lies_beside_it_is_not_read(there: Path, tmp_path: Path) -> None:
    evil = tmp_path / "evil.py"
    evil.write_text("def answer(path): return {'verdict': 'clean', 'evil': True}\n")
    cached = there / f"__pycache__/host_state.cpython-{sys.version_info.major}{sys.version_info.minor}.pyc"
    cached.parent.mkdir()
    code = f"import py_compile; py_compile.compile({str(evil)!r}, {str(cached)!r}, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "evil" not in (asked(Action(), tmp_path / "none") or {})


def test_a_host_without_an_interpreter_or_an_answer_is_sent_the_module(there: Path, tmp_path: Path) -> None:
    assert asked(Action(), tmp_path / "none", "/nowhere/python3") is None
    for answer in ("", "Killed\n", "[]\n", '"clean"\n', "{\n"):
        assert asked(Action(answer), tmp_path) is None
    assert asked(Action('sudo: unable to resolve host\n{"verdict": "clean"}\n'), tmp_path) == {"verdict": "clean"}


@pytest.mark.parametrize(
    ("arguments", "by_host"),
    [({}, True), ({"state": "checked"}, True), ({"state": "recorded"}, False), ({"record": "/elsewhere"}, False)],
)
def test_only_a_look_is_left_to_the_host(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, str], by_host: bool
) -> None:
    action = ActionModule.__new__(ActionModule)
    action._task = type("Task", (), {"args": arguments, "async_val": 0})()
    monkeypatch.setattr("ansible.plugins.action.ActionBase.run", lambda *_: {})
    monkeypatch.setattr(f"{ActionModule.__module__}.ask", lambda *_: {"verdict": "by host"})
    monkeypatch.setattr(action, "_execute_module", lambda **_: {"verdict": "sent"})
    found = action.run()
    assert found["verdict"] == ("by host" if by_host else "sent")
