"""What the state check and its report decide, without a host."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
from ansible_collections.nox.platform.plugins.callback import nox_report
from ansible_collections.nox.platform.plugins.module_utils import release_files
from ansible_collections.nox.platform.plugins.modules import nox_settings, nox_state

RULES = """\
-P INPUT DROP
-A INPUT -j ufw-before-input
-A ufw-before-input -j ufw-user-input
-A ufw-user-input -p tcp -m tcp --dport 22 -j ACCEPT
-A ufw-user-input -p tcp -m multiport --dports 80,443 -j ACCEPT
"""


def ids(findings: Any) -> list[str]:
    return [f"{one.id} {one.what}" for one in findings]


def unit(**changed: str) -> dict[str, str]:
    found = {
        "LoadState": "loaded",
        "ActiveState": "active",
        "SubState": "running",
        "UnitFileState": "enabled",
        "NeedDaemonReload": "no",
    }
    return {**found, **changed}


class TestPaths:
    def recorded(self, path: Path) -> dict[str, str]:
        return {"role": "nox_tools", **nox_state.describe(str(path), True)}

    def test_as_recorded(self, tmp_path: Path) -> None:
        path = tmp_path / "tool"
        path.write_text("as installed")
        assert list(nox_state.compare_path(str(path), self.recorded(path))) == []

    def test_content_and_mode_are_told_apart(self, tmp_path: Path) -> None:
        path = tmp_path / "tool"
        path.write_text("as installed")
        wanted = self.recorded(path)
        path.write_text("changed")
        path.chmod(0o666)
        assert ids(nox_state.compare_path(str(path), wanted)) == [f"path.changed {path}", f"path.mode {path}"]

    def test_another_kind_says_nothing_more(self, tmp_path: Path) -> None:
        path = tmp_path / "tool"
        path.write_text("as installed")
        wanted = self.recorded(path)
        path.unlink()
        assert ids(nox_state.compare_path(str(path), wanted)) == [f"path.missing {path}"]
        path.mkdir()
        assert ids(nox_state.compare_path(str(path), wanted)) == [f"path.kind {path}"]

    def test_links_by_their_target(self, tmp_path: Path) -> None:
        path = tmp_path / "current"
        path.symlink_to("releases/a")
        wanted = self.recorded(path)
        path.unlink()
        path.symlink_to("releases/b")
        finding = next(nox_state.compare_path(str(path), wanted))
        assert (finding.id, finding.expected, finding.found) == ("path.changed", "releases/a", "releases/b")


class TestUnits:
    @pytest.mark.parametrize(
        ("changed", "expected"),
        [
            ({}, []),
            ({"ActiveState": "failed"}, ["unit.failed"]),
            ({"ActiveState": "inactive", "SubState": "dead"}, ["unit.inactive"]),
            ({"LoadState": "masked", "ActiveState": "inactive"}, ["unit.masked"]),
            ({"LoadState": "not-found", "ActiveState": "inactive"}, ["unit.missing"]),
            ({"UnitFileState": "disabled"}, ["unit.disabled"]),
            ({"NeedDaemonReload": "yes"}, ["unit.reload"]),
        ],
    )
    def test_one_word_for_each_state(self, changed: dict[str, str], expected: list[str]) -> None:
        found = nox_state.compare_unit("a.service", "nox_service", unit(**changed))
        assert [finding.id for finding in found] == expected

    def test_no_answer_is_a_finding(self) -> None:
        assert ids(nox_state.compare_units({"a.service": "nox_service"}, {}, set())) == ["unit.unknown a.service"]


class TestFirewall:
    def test_as_recorded(self) -> None:
        assert list(nox_state.compare_firewall([22, 80, 443], RULES, "ENABLED=yes\n")) == []

    def test_a_lost_rule(self) -> None:
        assert ids(nox_state.compare_firewall([22, 8443], RULES, "ENABLED=yes\n")) == ["firewall.rule 8443/tcp"]

    def test_a_port_is_not_its_prefix(self) -> None:
        assert ids(nox_state.compare_firewall([44], RULES, "ENABLED=yes\n")) == ["firewall.rule 44/tcp"]

    def test_open_says_nothing_about_single_rules(self) -> None:
        opened = RULES.replace("-P INPUT DROP", "-P INPUT ACCEPT")
        assert ids(nox_state.compare_firewall([22], opened, "ENABLED=no\n")) == [
            "firewall.boot /etc/ufw/ufw.conf",
            "firewall.open INPUT",
        ]

    def test_a_chain_nobody_jumps_to_opens_nothing(self) -> None:
        cut = RULES.replace("-A ufw-before-input -j ufw-user-input\n", "")
        assert ids(nox_state.compare_firewall([22], cut, "ENABLED=yes\n")) == ["firewall.rule 22/tcp"]


class TestSettings:
    @pytest.fixture
    def config(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        path = tmp_path / "nox-api"
        monkeypatch.setattr(nox_state, "CONFIG", path)
        return path

    def test_a_hand_edit_is_no_drift(self, config: Path) -> None:
        config.write_text(f"NOX_API_TOKEN={'a1' * 32}\nNOX_PORT=9000\n")
        assert list(nox_state.compare_settings({"NOX_PORT": "[0-9]+"})) == []

    def test_what_nobody_can_read_is(self, config: Path) -> None:
        secret = "s3cret" * 8
        config.write_text(f"NOX_API_TOKEN {secret}\nNOX_PORT=many\n")
        found = list(nox_state.compare_settings({"NOX_PORT": "[0-9]+"}))
        assert ids(found) == [
            f"settings.line {config}:1",
            f"settings.value {config}:NOX_PORT",
            f"settings.token {config}:NOX_API_TOKEN",
        ]
        assert secret not in str(found)

    def test_only_the_operator_can_say_what_a_bad_token_was(self, config: Path) -> None:
        config.write_text("NOX_API_TOKEN=changeme\n")
        assert [one.owner for one in nox_state.compare_settings({})] == ["operator"]


def finding(owner: str, name: str = "path.missing") -> nox_state.Finding:
    return nox_state.Finding(name, owner, "x", "a", "b")


def test_only_the_owners_run_in_the_order_of_an_install() -> None:
    assert nox_state.owners_of([finding("nox_tools"), finding("nox_account"), finding("operator")]) == [
        "nox_account",
        "nox_tools",
    ]
    assert nox_state.owners_of([finding("all")]) == list(nox_state.ROLES)


def test_what_is_up_and_old_is_restarted() -> None:
    found = [finding("nox_service", "unit.stale"), finding("nox_proxy", "proxy.stale"), finding("nox_service")]
    assert nox_state.stale_units(found, "nox_service") == ["x"]
    assert nox_state.stale_units(found, "nox_proxy") == ["x"]


def test_another_sites_fault_is_told_from_ours() -> None:
    ours = ["/etc/caddy/sites-enabled/nox-api.caddy"]
    message = "Error: adapting config: /etc/caddy/sites-enabled/blog.caddy:2: unrecognized directive: nonsense"
    assert nox_state.blamed(message, ours) == "/etc/caddy/sites-enabled/blog.caddy"
    assert nox_state.blamed(message.replace("blog", "nox-api"), ours) == ""


def test_a_record_of_another_shape_is_none(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    for text in ("", "[]", '{"version": 0}', "{"):
        path.write_text(text)
        assert nox_state.read_record(path) == {}


def test_the_record_is_private_and_written_once(tmp_path: Path) -> None:
    path = tmp_path / "nox/state.json"
    assert nox_state.write_record(path, {"version": 1})
    assert path.stat().st_mode & 0o777 == 0o600
    if os.geteuid() == 0:
        assert not nox_state.write_record(path, {"version": 1})


def test_nothing_is_deleted_on_the_way(tmp_path: Path) -> None:
    changed, kind = tmp_path / "changed", tmp_path / "kind"
    changed.write_text("somebody's work")
    kind.mkdir()
    (kind / "inside").write_text("more of it")
    found = [
        nox_state.Finding("path.changed", "nox_tools", str(changed), "a", "b"),
        nox_state.Finding("path.kind", "nox_tools", str(kind), "file", "directory"),
    ]
    moved = nox_state.clear(found, {"version": 1}, tmp_path / "aside")
    assert [Path(one["to"]).exists() for one in moved] == [True, True]
    assert (Path(moved[1]["to"]) / "inside").read_text() == "more of it"
    assert changed.exists()
    assert not kind.exists()
    assert (tmp_path / "aside").stat().st_mode & 0o777 == 0o700


def test_lost_settings_come_back_where_they_are_usable(tmp_path: Path) -> None:
    state, front = tmp_path / "state.json", tmp_path / "settings"
    state.write_text(json.dumps({"settings": {"NOX_PORT": "9000", "NOX_TIMEOUT": "x", "OTHER": "1"}}))
    front.write_text(f"NOX_API_TOKEN={'b2' * 32}\nNOX_SANDBOX=/etc\n")
    patterns = {"NOX_PORT": "[0-9]+", "NOX_TIMEOUT": "[0-9]+", "NOX_SANDBOX": "/.*"}
    lost = {"state": str(state), "token": str(front)}
    # the front's copy is the front's to write: nothing but the token is believed
    assert nox_settings.recovered(lost, patterns) == {"NOX_PORT": "9000", "NOX_API_TOKEN": "b2" * 32}
    assert nox_settings.recovered({"state": "/nowhere", "token": "/nowhere"}, patterns) == {}


def test_a_release_that_others_may_change(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("")
    assert release_files.foreign_writer(tmp_path) == ""
    (tmp_path / "module.py").chmod(0o666)
    assert release_files.foreign_writer(tmp_path) == "module.py"


class TestReport:
    FOUND: ClassVar[dict[str, Any]] = {
        "id": "unit.failed",
        "owner": "nox_service",
        "what": "nox-api.service",
        "expected": "active",
        "found": "failed",
        "severity": "fail",
    }

    def test_one_word_per_host(self) -> None:
        drifted = nox_report.Host("drifted", [self.FOUND])
        assert nox_report.outcome(drifted, repairing=False) == "drifted"
        assert nox_report.outcome(drifted, repairing=True) == "failed"
        drifted.left = []
        assert nox_report.outcome(drifted, repairing=True) == "mended"
        drifted.left = [self.FOUND]
        assert nox_report.outcome(drifted, repairing=True) == "left"
        assert nox_report.outcome(nox_report.Host("absent"), repairing=True) == "not installed"
        assert nox_report.outcome(nox_report.Host("unreachable"), repairing=False) == "unreachable"

    def test_every_finding_is_in_the_table(self) -> None:
        hosts = {"b": nox_report.Host("drifted", [self.FOUND], left=[]), "a": nox_report.Host("clean")}
        text = nox_report.table(hosts, repairing=True)
        assert text.index("\na ") < text.index("\nb ")
        assert "mended  fail unit.failed nox-api.service: failed, not active" in text
