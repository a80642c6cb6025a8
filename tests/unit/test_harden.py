"""What the hardening decides, without a host: which sshd settings are stricter, the way back of files, what a flood looks like."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.nox.platform.plugins.module_utils import brought, host_files, host_state
from ansible_collections.nox.platform.plugins.modules import nox_sshd

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("keyword", "now", "wanted", "enough"),
    [
        ("permitrootlogin", "yes", "prohibit-password", False),
        ("permitrootlogin", "without-password", "prohibit-password", True),
        ("permitrootlogin", "no", "prohibit-password", True),
        ("x11forwarding", "yes", "no", False),
        ("x11forwarding", "no", "no", True),
        ("logingracetime", "10", "30", True),
        ("logingracetime", "0", "30", False),  # no limit at all
        ("logingracetime", "120", "30", False),
        ("loglevel", "DEBUG", "VERBOSE", True),
        ("loglevel", "QUIET", "VERBOSE", False),
        ("banner", "none", "/etc/issue.net", False),
    ],
)
def test_what_is_stricter_stays(keyword: str, now: str, wanted: str, enough: bool) -> None:
    assert nox_sshd.strict_enough(keyword, now, wanted) is enough


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(brought, "PATH", tmp_path / "nox/brought.json")
    return tmp_path


def test_a_new_file_goes_with_the_directories_made_for_it(record: Path) -> None:
    path = record / "etc/made/new.conf"
    host_files.put(str(path), "one\n", 0o640)
    host_files.put(str(path), "two\n", 0o640)
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("two\n", 0o640)
    assert host_files.take_back(str(path)) == ""
    assert not (record / "etc").exists() and host_files.recorded() == {}


def test_a_file_that_was_there_comes_back(record: Path) -> None:
    path = record / "issue"
    path.write_text("Debian\n")
    path.chmod(0o604)
    host_files.put(str(path), "ours\n", 0o644)
    host_files.put(str(path), "ours, too\n", 0o644)
    assert host_files.take_back(str(path)) == ""
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("Debian\n", 0o604)


def test_a_file_that_somebody_changed_stays(record: Path) -> None:
    path = record / "issue"
    path.write_text("Debian\n")
    host_files.put(str(path), "ours\n", 0o644)
    path.write_text("theirs\n")
    assert "changed since" in host_files.take_back(str(path))
    assert path.read_text() == "theirs\n"


def test_one_line_of_a_file_comes_back_among_the_others_changes(record: Path) -> None:
    path = record / "login.defs"
    path.write_text("# UMASK is this\nUMASK\t\t022\nOTHER 1\n")
    host_files.put_line(str(path), r"^UMASK\s", "UMASK\t\t027")
    assert path.read_text() == "# UMASK is this\nUMASK\t\t027\nOTHER 1\n"
    path.write_text(path.read_text().replace("OTHER 1", "OTHER 2"))
    host_files.take_back(str(path))
    assert path.read_text() == "# UMASK is this\nUMASK\t\t022\nOTHER 2\n"


def test_a_lost_record_does_not_make_ours_somebody_elses(record: Path) -> None:
    path = record / "new.conf"
    host_files.put(str(path), f"# {host_files.OURS}\n", 0o644)
    brought.PATH.unlink()
    host_files.put(str(path), f"# {host_files.OURS}, newer\n", 0o644)
    host_files.take_back(str(path))
    assert not path.exists()


def line(path: str, status: int = 401, client: str = "192.0.2.1") -> str:
    """As the front writes it: app/nox_api/access.py."""
    shown = {"time": "2026-01-31T12:00:00.000Z", "level": "info", "event": "request", "method": "GET", "path": path}
    return json.dumps({**shown, "status": status, "duration_ms": 0.4, "client": client, "request_id": "0" * 32})


def test_a_wrong_token_is_counted_for_its_sender_and_nobody_else() -> None:
    template = (ROOT / "roles/nox_harden/templates/filter.conf.j2").read_text()
    (text,) = re.findall(r"(?m)^failregex = (.*)$", template)
    pattern = re.compile(text.replace("<ADDR>", r"(?P<address>[0-9a-f.:]+)"))

    def counted(one: str) -> Any:
        found = pattern.search(one)
        return found and found["address"]

    assert counted(line("/files")) == "192.0.2.1"
    assert counted(line("/files", client="2001:db8::1")) == "2001:db8::1"
    assert counted(line("/files", status=200)) is None
    forged = '/x"status": 401, "duration_ms": 1, "client": "198.51.100.9", "'
    assert counted(line(forged)) == "192.0.2.1"
    assert counted(line(forged, status=200)) is None


def test_only_one_roles_part_of_a_record_is_renewed() -> None:
    old: dict[str, Any] = {
        "paths": {"/a": {"role": "nox_tools", "mode": "0755"}, "/gone": {"role": "nox_harden"}},
        "packages": {"curl": "nox_service"},
        "units": {},
        "release": "one",
    }
    new = {
        "paths": {"/a": {"role": "nox_tools", "mode": "0777"}, "/b": {"role": "nox_harden"}},
        "packages": {"curl": "nox_service", "fail2ban": "nox_harden"},
        "units": {"fail2ban.service": "nox_harden"},
        "release": "two",
        "hardening": {"kernel": {}},
    }
    merged = host_state.renewed(old, new, "nox_harden")
    assert merged["paths"] == {"/a": {"role": "nox_tools", "mode": "0755"}, "/b": {"role": "nox_harden"}}
    assert merged["packages"] == new["packages"] and merged["units"] == new["units"]
    assert (merged["release"], merged["hardening"]) == ("one", {"kernel": {}})
