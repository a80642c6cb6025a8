"""Files, directories and links in one round trip: made, compared, checked, and no way led astray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def ran(*files: dict[str, Any], check: bool = False) -> dict[str, Any]:
    """The module as Ansible runs it; owners are those of who runs the test."""
    stat = Path("/proc/self").stat()
    mine = {"owner": Path("/proc/self").owner(), "group": Path("/proc/self").group()}
    assert stat.st_uid == os.geteuid()
    arguments = {"files": [{**mine, **one} for one in files], "_ansible_check_mode": check, "_ansible_diff": True}
    code = (
        "from ansible.module_utils.testing import patch_module_args; import sys, json; "
        "from ansible_collections.nox.platform.plugins.modules import nox_files as m\n"
        "with patch_module_args(json.load(sys.stdin)): m.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(arguments),
        env={**os.environ, "PYTHONPATH": str(ROOT / ".collections")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    wanted = [
        {"path": [str(tmp_path / "a"), str(tmp_path / "a/b")], "state": "directory", "mode": "2750"},
        {"path": [str(tmp_path / "a/file")], "content": "é\n", "mode": "0640", "validate": "grep -q é %s"},
        {"path": [str(tmp_path / "a/link")], "state": "link", "target": "not/there/yet"},
    ]
    checked = ran(*wanted, check=True)
    assert not list(tmp_path.iterdir())
    first = ran(*wanted)
    assert (
        first["written"] == checked["written"] == [str(tmp_path / f"a{rest}") for rest in ("", "/b", "/file", "/link")]
    )
    assert first["diff"] == checked["diff"]
    assert (tmp_path / "a/file").read_text() == "é\n"
    assert (tmp_path / "a/file").stat().st_mode & 0o7777 == 0o640
    assert (tmp_path / "a/b").stat().st_mode & 0o7777 == 0o2750
    assert (tmp_path / "a/link").readlink() == Path("not/there/yet")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b", "file", "link"]
    assert ran(*wanted)["changed"] is False


def test_only_the_mode_differs(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("same")
    path.chmod(0o666)
    inode = path.stat().st_ino
    assert ran({"path": [str(path)], "content": "same"})["changed"] is True
    assert (path.stat().st_mode & 0o7777, path.stat().st_ino) == (0o644, inode)


def test_what_its_checker_refuses_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "some.conf"
    path.write_text("good")
    found = ran({"path": [str(path)], "content": "bad", "validate": "sh -c 'basename \"$1\"; exit 1' sh %s"})
    assert found["failed"]
    assert "refuses it: some.conf" in found["msg"], "it is checked under its own name"
    assert [one.name for one in tmp_path.iterdir()] == ["some.conf"]
    assert path.read_text() == "good"


def test_a_link_in_a_files_place_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "file").symlink_to("elsewhere")
    ran({"path": [str(tmp_path / "file")], "content": "ours"})
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "elsewhere").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link to somebody else")
def test_only_roots_own_link_leads_to_a_directory(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir(mode=0o700)
    link = tmp_path / "place"
    link.symlink_to("disk")
    wanted = {"path": [str(link)], "state": "directory", "mode": "0755"}
    os.chown(link, 65534, 65534, follow_symlinks=False)
    assert "is something else" in ran(wanted)["msg"]
    assert (tmp_path / "disk").stat().st_mode & 0o7777 == 0o700
    os.chown(link, 0, 0, follow_symlinks=False)
    assert ran(wanted)["changed"] is True
    assert (tmp_path / "disk").stat().st_mode & 0o7777 == 0o755


def test_a_check_knows_no_owner_yet(tmp_path: Path) -> None:
    one = {"path": [str(tmp_path / "new")], "state": "directory", "owner": "nobody-of-that-name"}
    assert ran(one, check=True)["changed"] is True
    assert "there is no user nobody-of-that-name" in ran(one)["msg"]


def test_away(tmp_path: Path) -> None:
    (tmp_path / "site").write_text("x")
    wanted = {"path": [str(tmp_path / "site"), str(tmp_path / "never")], "state": "absent"}
    assert ran(wanted)["written"] == [str(tmp_path / "site")]
    assert ran(wanted)["changed"] is False
