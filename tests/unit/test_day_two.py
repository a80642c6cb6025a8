"""What the modules of day two decide, without a host: tokens, what a support bundle hides, what a backup may hold."""

from __future__ import annotations

import base64
import io
import json
import math
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.nox.platform.plugins.module_utils import brought_packages
from ansible_collections.nox.platform.plugins.module_utils.settings_file import parse_settings
from ansible_collections.nox.platform.plugins.modules import nox_support, nox_token

ROOT = Path(__file__).resolve().parents[2]
OLD, NEW = "0123456789abcdef" * 4, "fedcba9876543210" * 4
SETTINGS = f"# mine\nNOX_PORT=8080\n\n# Bearer token\nNOX_API_TOKEN={OLD}\nNOX_QUEUE=7\n"


def run(name: str, parameters: dict[str, Any], before: str = "") -> subprocess.CompletedProcess[str]:
    program = f"""
import json, sys
sys.path[:0] = [{str(ROOT / ".collections")!r}]
from ansible.module_utils.testing import patch_module_args
from ansible_collections.nox.platform.plugins.modules import {name} as module
{before}
with patch_module_args(json.load(sys.stdin)):
    module.main()
"""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, input=json.dumps(parameters), capture_output=True, text=True)


class TestToken:
    def test_the_old_one_stays_beside_the_new_one(self) -> None:
        found = parse_settings(nox_token.rotate(SETTINGS, NEW, 60))
        assert (found["NOX_API_TOKEN"], found["NOX_API_TOKEN_PREVIOUS"]) == (NEW, OLD)
        assert nox_token.ends(found) > 0 and found["NOX_QUEUE"] == "7"

    def test_without_an_overlap_it_is_gone(self) -> None:
        assert OLD not in nox_token.rotate(SETTINGS, NEW, 0)

    def test_afterwards_nothing_else_has_changed(self) -> None:
        text = nox_token.rotate(SETTINGS, NEW, 60)
        again = nox_token.without(text, (nox_token.PREVIOUS, nox_token.UNTIL))
        assert again == SETTINGS.replace(OLD, NEW)

    def test_one_without_an_end_never_ends(self) -> None:
        assert nox_token.ends({"NOX_API_TOKEN_PREVIOUS": OLD}) == math.inf
        assert nox_token.ends({"NOX_API_TOKEN": OLD}) == 0

    @pytest.mark.parametrize("state", ["rotated", "settled"])
    def test_the_module_tells_no_token(self, tmp_path: Path, state: str) -> None:
        path, record = tmp_path / "settings", tmp_path / "record"
        path.write_text(nox_token.rotate(SETTINGS, NEW, 60) if state == "settled" else SETTINGS)
        record.write_text(json.dumps({"token_sha256": "x"}))
        words = {"state": state, "path": str(path), "record": str(record), "_ansible_diff": True}
        # only root may give files away
        done = run("nox_token", words, "module.write_private = lambda path, text: path.write_text(text)")
        assert json.loads(done.stdout)["changed"], done.stderr
        tokens = {OLD, NEW, parse_settings(path.read_text())["NOX_API_TOKEN"]}
        assert len(tokens) == (3 if state == "rotated" else 2)
        assert not any(token in done.stdout + done.stderr for token in tokens)


class TestSupport:
    def test_a_token_is_struck_out_in_every_form(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "settings"
        path.write_text(f"NOX_API_TOKEN={NEW}\n# not usable, set aside: NOX_API_TOKEN={OLD}\n")
        monkeypatch.setattr(nox_support, "SETTINGS", (path,))
        secrets = nox_support.secret_values()
        for token in (OLD, NEW):
            for offset in range(3):
                coded = base64.b64encode(b"x" * offset + token.encode() + b"yz").decode()
                text, count = nox_support.scrub(f"a {token} b {token[::-1]} c {coded} d", secrets)
                assert count >= 3 and token not in text and token[::-1] not in text
                assert coded[6:40] not in text and text.startswith("a ") and text.endswith(" d")

    @pytest.mark.parametrize(
        "text",
        ["password=hunter2hunter2", '"api_key": "s3cr3ts3cr3t"', "Authorization: Bearer abcdefgh", "TOKEN: aaaaaaaa"],
    )
    def test_what_looks_like_a_secret_is_struck_out(self, text: str) -> None:
        clean, count = nox_support.scrub(text, [])
        assert count == 1 and clean.endswith(("<struck out>", '<struck out>"'))

    def test_what_does_not_stays(self) -> None:
        text = (
            '{"event": "request", "path": "/run_py", "status": 200, "request_id": "4f5e6d7c8b9a4f5e6d7c8b9a4f5e6d7c"}'
        )
        assert nox_support.scrub(text, [NEW]) == (text, 0)


def test_what_apt_would_purge() -> None:
    plan = "Reading…\nPurg ufw [0.36.2-1]\nRemv iptables [1.8.9-2] []\nInst x (1)\n"
    assert brought_packages.purged(plan) == ["ufw", "iptables"]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "other"])
def test_a_backup_with_anything_else_in_it_is_refused(tmp_path: Path, name: str) -> None:
    archive = tmp_path / "backup.tar.gz"
    with tarfile.open(archive, "w:gz") as whole:
        entry = tarfile.TarInfo(name)
        entry.size = 1
        whole.addfile(entry, io.BytesIO(b"x"))
    parts = tmp_path / "parts"
    parts.mkdir()
    words = {"state": "opened", "path": str(archive), "directory": str(parts)}
    done = run("nox_backup", words)
    assert "which is no part of a backup" in json.loads(done.stdout)["msg"], done.stderr
    assert list(parts.iterdir()) == [] and list(tmp_path.iterdir()) != []
