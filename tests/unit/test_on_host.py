"""A host's own copy of the check: asked where it is the very one that would be sent, and nowhere else."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleActionFail
from ansible_collections.nox.platform.plugins.action import (
    nox_archive,
    nox_gate,
    nox_release,
    nox_state,
    nox_status,
    nox_units,
)
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

    def __init__(self, answer: str | None = None, environment: str = "") -> None:
        self.answer, self.environment = answer, environment

    def _low_level_execute_command(self, command: str) -> dict[str, Any]:
        if self.answer is not None:
            return {"rc": 0, "stdout": self.answer}
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
        return {"rc": done.returncode, "stdout": done.stdout}

    def _compute_environment_string(self) -> str:
        return self.environment


def options(record: Path) -> dict[str, Any]:
    defaults = {"about": {}, "aside": "/nowhere", "role": "", "paths": ["/"]}
    return {"state": "checked", "record": str(record), "check_mode": False, **defaults}


def asked(action: Action, record: Path, python: str = sys.executable) -> dict[str, Any] | None:
    return on_host.ask(action, {"ansible_python_interpreter": python}, "host_state", options(record))  # type: ignore[arg-type]


def test_it_says_what_the_module_would(there: Path, tmp_path: Path) -> None:
    found, expected = asked(Action(), tmp_path / "none"), host_state.answer(options(tmp_path / "none"))
    assert found and {**found, "seconds": 0, "host": 0} == {**expected, "seconds": 0, "host": 0}
    assert found["host"]["free_mib"].keys() == {"/"}
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


def test_the_playbooks_environment_reaches_it(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_host, "CODE", "import json, os; print(json.dumps(dict(os.environ)))")
    found = asked(Action(environment="TMPDIR='/run/a b' OTHER=x"), tmp_path)
    assert found and (found["TMPDIR"], found["OTHER"]) == ("/run/a b", "x")


def test_an_error_of_the_system_is_told_in_its_own_words(there: Path, tmp_path: Path) -> None:
    """It is no reason to send the module, which would do all of it again."""
    told = {"root": str(tmp_path / "file/root"), "id": "1-a", "sha256": "", "piece": None, "check_mode": False}
    (tmp_path / "file").touch()
    action = Action()
    found = on_host.ask(action, {"ansible_python_interpreter": sys.executable}, "archives", told)  # type: ignore[arg-type]
    assert found and found["failed"] and "Not a directory" in found["msg"]


@pytest.mark.parametrize(
    ("variables", "configured", "expected"),
    [
        ({"ansible_python_interpreter": "/a"}, "/b", "/a"),
        ({}, "/b", "/b"),
        ({}, "auto", "/usr/bin/python3"),
        ({"ansible_python_interpreter": "auto_silent"}, "/b", "/usr/bin/python3"),
        ({"ansible_facts": {"discovered_interpreter_python": "/c"}}, "auto", "/c"),
        ({"ansible_facts": {"discovered_interpreter_python": "/c"}}, "/b", "/b"),
    ],
)
def test_the_interpreter_is_the_one_that_modules_have(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, Any], configured: str, expected: str
) -> None:
    monkeypatch.setattr(on_host.C.config, "get_config_value", lambda name: configured)
    assert on_host.interpreter(variables) == expected


class TestAction:
    """What a task becomes: the host's answer, or the module."""

    @pytest.fixture
    def task(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[nox_state.ActionModule]:
        action = nox_state.ActionModule.__new__(nox_state.ActionModule)
        action._task = type("Task", (), {"args": {"state": "recorded"}, "check_mode": True})()
        monkeypatch.setattr("ansible.plugins.action.ActionBase.run", lambda *_: {})
        monkeypatch.setattr(action, "_execute_module", lambda **told: {"verdict": "sent", "sent": True, "told": told})
        yield action

    def test_the_host_is_told_all_options_and_the_check_mode(
        self, task: nox_state.ActionModule, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(on_host, "ask", lambda *told: {"verdict": "by host", "told": told[2:]})
        found = task.run()
        assert (found["verdict"], found["sent"]) == ("by host", False)
        name, told = found["told"]
        assert name == "host_state"
        assert told == {
            "state": "recorded", "record": host_state.RECORD, "aside": "/var/lib/nox/aside", "about": {}, "role": "",
            "paths": [], "check_mode": True,
        }  # fmt: skip

    def test_without_an_answer_the_module_is_sent(
        self, task: nox_state.ActionModule, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(on_host, "ask", lambda *_: None)
        found = task.run()
        assert found["sent"] and found["told"]["module_args"] == {"state": "recorded"}

    @pytest.mark.parametrize("wrong", [{"state": "other"}, {"sate": "checked"}, {"paths": 3.5j}])
    def test_options_are_checked_before_a_host_is_asked(
        self, task: nox_state.ActionModule, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
    ) -> None:
        monkeypatch.setattr(on_host, "ask", lambda *_: pytest.fail("a host was asked"))
        task._task.args = wrong
        with pytest.raises(AnsibleActionFail):
            task.run()


@pytest.mark.parametrize("action", [nox_archive, nox_gate, nox_release, nox_state, nox_status, nox_units])
def test_each_module_has_its_documented_options_and_its_code_on_the_host(action: Any) -> None:
    name = action.__name__.rpartition(".")[2]
    module = importlib.import_module(f"ansible_collections.nox.platform.plugins.modules.{name}")
    options = yaml.safe_load(module.DOCUMENTATION)["options"]
    spec = action.ActionModule.ARGUMENTS["argument_spec"]
    assert {key: (value["type"], value.get("default")) for key, value in options.items()} == {
        key: (value["type"], value.get("default")) for key, value in spec.items()
    }
    assert action.ActionModule.LOGIC in host_state.PACKAGE
