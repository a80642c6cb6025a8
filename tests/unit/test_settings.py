"""The settings file: inventory, hand edits and the token."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.nox.platform.plugins.module_utils.settings_file import parse_settings, token_state
from ansible_collections.nox.platform.plugins.modules import nox_settings as module

ROOT = Path(__file__).resolve().parents[2]
GOOD = "5f0c" * 16
ENTRIES = [
    {"name": "NOX_PORT", "value": "8080", "pattern": "[0-9]+", "comment": "TCP port"},
    {"name": "NOX_TIMEOUT", "value": "20", "pattern": "[0-9]+", "comment": "Seconds"},
]


@pytest.mark.parametrize(
    ("token", "state"),
    [
        (None, "absent"),
        ("", "absent"),
        ("replace_with_secure_token", "placeholder"),
        ("changeme", "placeholder"),
        ("your-token-here-please-change-it-now", "placeholder"),
        ("a" * 64, "placeholder"),
        ("short", "short"),
        ("f" * 15 + "0" * 16, "short"),
        ("f0" * 15 + "é" * 5, "malformed"),
        ("two words " * 5, "malformed"),
        (GOOD, "ok"),
    ],
)
def test_tokens_are_judged(token: str | None, state: str) -> None:
    assert token_state(token) == state


def test_parsing_is_a_shells() -> None:
    text = "# A=1\nexport A='x y'\nB=\"2\"\n  C=3  \nnonsense\nB=4\n"
    assert parse_settings(text) == {"A": "x y", "B": "4", "C": "3"}


class TestMerge:
    def test_inventory_reaches_what_nobody_touched(self) -> None:
        assert module.merge({"P": "1"}, {"P": "1"}, {"P": "2"}, False) == ({"P": "2"}, [])

    def test_a_hand_edit_stays_and_is_named(self) -> None:
        values, kept = module.merge({"P": "9"}, {"P": "1"}, {"P": "1"}, False)
        assert values == {"P": "9"}
        assert kept == [{"name": "P", "kept": "9", "inventory": "1"}]

    def test_without_a_record_everything_there_is_somebodys(self) -> None:
        assert module.merge({"P": "9"}, {}, {"P": "1", "Q": "2"}, False)[0] == {"P": "9", "Q": "2"}

    def test_force_lets_the_inventory_win(self) -> None:
        assert module.merge({"P": "9"}, {"P": "1"}, {"P": "1"}, True) == ({"P": "1"}, [])


def test_what_nobody_can_read_is_kept_as_a_comment() -> None:
    text, problems = module.set_aside_unusable("A=1\nNOX_PORT=abc\n{{{\n# fine\n", {"NOX_PORT": "[0-9]+"})
    assert text == f"A=1\n{module.SET_ASIDE}NOX_PORT=abc\n{module.SET_ASIDE}{{{{{{\n# fine\n"
    assert len(problems) == 2


def test_assignments_keep_their_place() -> None:
    assert module.assign("A=1\n# c\nB=2\n", "A", "9", "") == "A=9\n# c\nB=2\n"
    assert module.assign("A=1\n", "B", "2", "why") == "A=1\n\n# why\nB=2\n"
    # a shell takes the last one, so that is the one to change
    assert module.assign("A=1\nA=2\n", "A", "9", "") == "A=1\nA=9\n"


def test_no_diff_shows_a_token() -> None:
    text = f"NOX_API_TOKEN={GOOD}\n#NOX_API_TOKEN={GOOD}\n{module.SET_ASIDE}export NOX_API_TOKEN = {GOOD}\nNOX_PORT=1\n"
    assert GOOD not in module.masked(text)
    assert "NOX_PORT=1" in module.masked(text)


def run(tmp_path: Path, check: bool = False, **parameters: Any) -> dict[str, Any]:
    """The module as Ansible starts it: a process with JSON on stdin."""
    arguments = {
        "path": str(tmp_path / "nox-api"),
        "record": str(tmp_path / "record.json"),
        "settings": ENTRIES,
        "_ansible_check_mode": check,
        "_ansible_diff": True,
        **parameters,
    }
    program = f"""
import json, os, sys
sys.path[:0] = [{str(ROOT / ".collections")!r}]
from ansible.module_utils.testing import patch_module_args
from ansible_collections.nox.platform.plugins.modules import nox_settings as module
os.fchown = lambda *arguments: None  # only root may
module.is_private = lambda path: path.is_file() and path.stat().st_mode & 0o777 == 0o600
with patch_module_args(json.load(sys.stdin)):
    module.main()
"""
    done = subprocess.run([sys.executable, "-c", program], input=json.dumps(arguments), capture_output=True, text=True)
    return dict(json.loads(done.stdout))


class TestModule:
    def test_first_install_makes_a_token_that_stays(self, tmp_path: Path) -> None:
        first = run(tmp_path)
        assert (first["changed"], first["token"]) == (True, "generated")
        text = (tmp_path / "nox-api").read_text()
        token = parse_settings(text)["NOX_API_TOKEN"]
        assert token_state(token) == "ok"
        assert len(token) == 64
        assert token not in json.dumps(first)
        assert token not in (tmp_path / "record.json").read_text()
        second = run(tmp_path)
        assert (second["changed"], second["token"]) == (False, "kept")
        assert (tmp_path / "nox-api").read_text() == text

    def test_check_mode_writes_nothing_and_tells_the_same(self, tmp_path: Path) -> None:
        told = run(tmp_path, check=True)
        assert told["changed"]
        assert list(tmp_path.iterdir()) == []

    def test_hand_edits_survive_two_reruns_and_a_changed_inventory(self, tmp_path: Path) -> None:
        run(tmp_path)
        file = tmp_path / "nox-api"
        file.write_text(file.read_text().replace("NOX_TIMEOUT=20", "NOX_TIMEOUT=60") + "MY_OWN=1\n")
        file.chmod(0o600)
        changed = [{**ENTRIES[0], "value": "9090"}, {**ENTRIES[1], "value": "30"}]
        for _ in range(2):
            told = run(tmp_path, settings=changed)
            assert told["settings"] == {"NOX_PORT": "9090", "NOX_TIMEOUT": "60"}
            assert told["kept"] == [{"name": "NOX_TIMEOUT", "kept": "60", "inventory": "30"}]
        assert not told["changed"]
        assert "MY_OWN=1" in file.read_text()
        assert run(tmp_path, settings=changed, force=True)["settings"]["NOX_TIMEOUT"] == "30"

    def test_a_token_written_by_hand_beats_one_from_the_inventory(self, tmp_path: Path) -> None:
        run(tmp_path)
        file = tmp_path / "nox-api"
        by_hand = "ab12" * 16
        file.write_text(f"NOX_API_TOKEN={by_hand}\n")
        assert run(tmp_path, token=GOOD)["token"] == "kept"
        assert parse_settings(file.read_text())["NOX_API_TOKEN"] == by_hand
        assert run(tmp_path, token=GOOD, force=True)["token"] == "given"
        assert parse_settings(file.read_text())["NOX_API_TOKEN"] == GOOD

    def test_a_new_token_in_the_inventory_replaces_the_one_it_gave(self, tmp_path: Path) -> None:
        run(tmp_path, token=GOOD)
        assert run(tmp_path, token="cd34" * 16)["token"] == "given"

    def test_a_placeholder_is_refused_and_nothing_is_written(self, tmp_path: Path) -> None:
        told = run(tmp_path, token="replace_with_secure_token_of_32_chars")
        assert told["failed"]
        assert "openssl rand -hex 32" in told["msg"]
        assert list(tmp_path.iterdir()) == []
