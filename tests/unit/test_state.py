"""What the state check and its report decide, without a host."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import sys
import tarfile
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
from ansible_collections.nox.platform.plugins.callback import nox_report
from ansible_collections.nox.platform.plugins.module_utils import host_state, release_files, releases
from ansible_collections.nox.platform.plugins.module_utils.digests import digest_of
from ansible_collections.nox.platform.plugins.modules import nox_settings

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "playbooks"))
import drift

ROOT = Path(__file__).resolve().parents[2]

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
        return {"role": "nox_tools", **host_state.describe(str(path), True)}

    def test_as_recorded(self, tmp_path: Path) -> None:
        path = tmp_path / "tool"
        path.write_text("as installed")
        assert list(host_state.compare_path(str(path), self.recorded(path))) == []

    def test_content_and_mode_are_told_apart(self, tmp_path: Path) -> None:
        path = tmp_path / "tool"
        path.write_text("as installed")
        wanted = self.recorded(path)
        path.write_text("changed")
        path.chmod(0o666)
        assert ids(host_state.compare_path(str(path), wanted)) == [f"path.changed {path}", f"path.mode {path}"]

    def test_another_kind_says_nothing_more(self, tmp_path: Path) -> None:
        path = tmp_path / "tool"
        path.write_text("as installed")
        wanted = self.recorded(path)
        path.unlink()
        assert ids(host_state.compare_path(str(path), wanted)) == [f"path.missing {path}"]
        path.mkdir()
        assert ids(host_state.compare_path(str(path), wanted)) == [f"path.kind {path}"]

    def test_links_by_their_target(self, tmp_path: Path) -> None:
        path = tmp_path / "current"
        path.symlink_to("releases/a")
        wanted = self.recorded(path)
        path.unlink()
        path.symlink_to("releases/b")
        finding = next(host_state.compare_path(str(path), wanted))
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
        found = host_state.compare_unit("a.service", "nox_service", unit(**changed))
        assert [finding.id for finding in found] == expected

    def test_no_answer_is_a_finding(self) -> None:
        assert ids(host_state.compare_units({"a.service": "nox_service"}, {}, set())) == ["unit.unknown a.service"]


class TestFirewall:
    def test_as_recorded(self) -> None:
        assert list(host_state.compare_firewall([22, 80, 443], RULES, "ENABLED=yes\n")) == []

    def test_a_lost_rule(self) -> None:
        assert ids(host_state.compare_firewall([22, 8443], RULES, "ENABLED=yes\n")) == ["firewall.rule 8443/tcp"]

    def test_a_port_is_not_its_prefix(self) -> None:
        assert ids(host_state.compare_firewall([44], RULES, "ENABLED=yes\n")) == ["firewall.rule 44/tcp"]

    def test_open_says_nothing_about_single_rules(self) -> None:
        opened = RULES.replace("-P INPUT DROP", "-P INPUT ACCEPT")
        assert ids(host_state.compare_firewall([22], opened, "ENABLED=no\n")) == [
            "firewall.boot /etc/ufw/ufw.conf",
            "firewall.open INPUT",
        ]

    def test_a_chain_nobody_jumps_to_opens_nothing(self) -> None:
        cut = RULES.replace("-A ufw-before-input -j ufw-user-input\n", "")
        assert ids(host_state.compare_firewall([22], cut, "ENABLED=yes\n")) == ["firewall.rule 22/tcp"]


class TestSettings:
    @pytest.fixture
    def config(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        path = tmp_path / "nox-api"
        monkeypatch.setattr(host_state, "CONFIG", path)
        return path

    def test_a_hand_edit_is_no_drift(self, config: Path) -> None:
        config.write_text(f"NOX_API_TOKEN={'a1' * 32}\nNOX_PORT=9000\n")
        assert list(host_state.compare_settings({"NOX_PORT": "[0-9]+"})) == []

    def test_what_nobody_can_read_is(self, config: Path) -> None:
        secret = "s3cret" * 8
        config.write_text(f"NOX_API_TOKEN {secret}\nNOX_PORT=many\n")
        found = list(host_state.compare_settings({"NOX_PORT": "[0-9]+"}))
        assert ids(found) == [
            f"settings.line {config}:1",
            f"settings.value {config}:NOX_PORT",
            f"settings.token {config}:NOX_API_TOKEN",
        ]
        assert secret not in str(found)

    def test_only_the_operator_can_say_what_a_bad_token_was(self, config: Path) -> None:
        config.write_text("NOX_API_TOKEN=changeme\n")
        assert [one.owner for one in host_state.compare_settings({})] == ["operator"]


def finding(owner: str, name: str = "path.missing") -> host_state.Finding:
    return host_state.Finding(name, owner, "x", "a", "b")


def test_only_the_owners_run_in_the_order_of_an_install() -> None:
    assert host_state.owners_of([finding("nox_tools"), finding("nox_account"), finding("operator")]) == [
        "nox_account",
        "nox_tools",
    ]
    never_hardened = [role for role in host_state.ROLES if role != "nox_harden"]
    assert host_state.owners_of([finding("all")]) == never_hardened


def test_what_is_only_down_is_started_without_its_role() -> None:
    found = [
        host_state.Finding("unit.failed", "nox_service", "nox-api.service", "active", "failed"),
        host_state.Finding("unit.inactive", "nox_service", "nox-runner.socket", "active", "inactive"),
        host_state.Finding("unit.inactive", "nox_proxy", "caddy.service", "active", "inactive"),
        host_state.Finding("path.missing", "nox_proxy", "/etc/caddy/Caddyfile", "file", "nothing"),
    ]
    assert host_state.owners_of(found) == ["nox_proxy"]
    assert host_state.down_units(found) == ["nox-runner.socket", "nox-api.service"]
    stale = host_state.Finding("proxy.stale", "nox_proxy", "caddy.service", "a", "b")
    assert (host_state.owners_of([stale]), host_state.down_units([stale])) == ([], [])
    missing = host_state.Finding("record.missing", "all", "/x", "a record", "nothing")
    assert host_state.down_units([*found, missing]) == []


def test_what_is_up_and_old_is_restarted() -> None:
    found = [finding("nox_service", "unit.stale"), finding("nox_proxy", "proxy.stale"), finding("nox_service")]
    assert host_state.stale_units(found, "nox_service") == ["x"]
    assert host_state.stale_units(found, "nox_proxy") == ["x"]


def test_another_sites_fault_is_told_from_ours() -> None:
    ours = ["/etc/caddy/sites-enabled/nox-api.caddy"]
    message = "Error: adapting config: /etc/caddy/sites-enabled/blog.caddy:2: unrecognized directive: nonsense"
    assert host_state.blamed(message, ours) == "/etc/caddy/sites-enabled/blog.caddy"
    assert host_state.blamed(message.replace("blog", "nox-api"), ours) == ""


class TestSince:
    def test_a_change_is_as_old_as_the_files_status(self, tmp_path: Path) -> None:
        path = tmp_path / "tool"
        path.write_text("changed")
        os.utime(path, (0, 0))  # which anybody can set
        one = host_state.Finding("path.changed", "nox_tools", str(path), "a", "b")
        assert host_state.since(one, {}) == host_state.text_of(path.stat().st_ctime)

    def test_what_is_gone_went_at_its_directorys_last_change_or_before(self, tmp_path: Path) -> None:
        one = host_state.Finding("path.missing", "nox_tools", str(tmp_path / "gone/deeper/tool"), "a", "b")
        assert host_state.since(one, {}) == host_state.text_of(tmp_path.stat().st_mtime)

    def test_a_unit_since_it_went_down(self) -> None:
        down = unit(ActiveState="failed", InactiveEnterTimestampMonotonic=str(int(time.monotonic() * 1e6)))
        one = host_state.Finding("unit.failed", "nox_service", "a.service", "a", "b")
        assert host_state.since(one, {"a.service": down}) in (host_state.text_of(time.time() - n) for n in (0, 1))
        assert host_state.since(one, {"a.service": unit()}) == ""

    def test_an_owner_without_a_name_says_nothing_about_the_file(self, tmp_path: Path) -> None:
        for found in ("999:999", "root:999"):
            one = host_state.Finding("path.owner", "nox_account", str(tmp_path), "root:nox", found)
            assert host_state.since(one, {}) == ""


def test_a_time_still_to_come_is_no_sign_of_an_old_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_state, "UNIT_DIR", str(tmp_path))
    monkeypatch.setattr(host_state, "ROOT", tmp_path)
    path = tmp_path / "nox-api.service"
    path.write_text("")
    units = {"nox-api.service": unit(MainPID=str(os.getpid()))}
    wanted = {"nox-api.service": "nox_service"}
    monkeypatch.setattr(host_state, "started", lambda pid: time.time() - 100)
    assert ids(host_state.compare_units(wanted, units, set())) == ["unit.stale nox-api.service"]
    os.utime(path, (time.time() + 3600,) * 2)
    assert ids(host_state.compare_units(wanted, units, set())) == []


def test_the_clock_behind_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    host_state.write_record(path, {"version": host_state.VERSION})
    monkeypatch.setattr(host_state, "examine", lambda record: [])
    if os.geteuid() == 0:
        assert host_state.look(path)[0] == "clean"
    os.utime(path, (time.time() + 3600,) * 2)
    assert "clock.behind clock" in ids(host_state.look(path)[1])
    # the next good moment to remember is a new one
    assert host_state.write_record(path, {"version": host_state.VERSION})
    assert "clock.behind clock" not in ids(host_state.look(path)[1])


def test_a_record_of_another_shape_is_none(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    for text in ("", "[]", '{"version": 0}', "{", '{"version": 1}', '{"version": 1, "digest": []}'):
        path.write_text(text)
        assert host_state.read_record(path) == {}
    record = {"version": host_state.VERSION, "paths": {"/a": {"role": "nox_service"}}}
    host_state.write_record(path, record)
    assert host_state.read_record(path) == record
    path.write_text(path.read_text().replace("nox_service", "nox_tools"))
    assert host_state.read_record(path) == {}


def test_the_record_is_private_and_written_once(tmp_path: Path) -> None:
    path = tmp_path / "nox/state.json"
    assert host_state.write_record(path, {"version": 1})
    assert path.stat().st_mode & 0o777 == 0o600
    if os.geteuid() == 0:
        assert not host_state.write_record(path, {"version": 1})


def test_nothing_is_deleted_on_the_way(tmp_path: Path) -> None:
    changed, kind = tmp_path / "changed", tmp_path / "kind"
    changed.write_text("somebody's work")
    kind.mkdir()
    (kind / "inside").write_text("more of it")
    found = [
        host_state.Finding("path.changed", "nox_tools", str(changed), "a", "b"),
        host_state.Finding("path.kind", "nox_tools", str(kind), "file", "directory"),
    ]
    moved = host_state.clear(found, {"version": 1}, tmp_path / "aside")
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


def test_the_package_on_the_host_is_all_that_is_run_there() -> None:
    """Role nox_tools installs it, the check itself compares it; the standard library has the rest."""
    utils, found, waiting = (
        ROOT / "plugins/module_utils",
        {"__init__"},
        ["archives", "host_gate", "host_state", "host_status", "releases", "units"],
    )
    while waiting:
        name = waiting.pop()
        found.add(name)
        for node in ast.walk(ast.parse((utils / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                waiting += {node.module} if node.module else {one.name for one in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert str(node.module).partition(".")[0] in sys.stdlib_module_names, name
            elif isinstance(node, ast.Import):
                assert {one.name.partition(".")[0] for one in node.names} <= sys.stdlib_module_names, name
        waiting = [one for one in waiting if one not in found]
    assert found == set(host_state.PACKAGE)
    tasks = (ROOT / "roles/nox_tools/tasks/main.yml").read_text()
    assert set(re.findall(r"share/nox/host_state/(\w+)\.py", tasks)) == found
    assert {f"/usr/local/share/nox/host_state/{name}.py" for name in found} <= set(host_state.PATHS)


def test_a_release_that_others_may_change(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("")
    assert release_files.foreign_writer(list(release_files.entries(tmp_path))) == ""
    (tmp_path / "module.py").chmod(0o666)
    assert release_files.foreign_writer(list(release_files.entries(tmp_path))) == "module.py"


def test_a_lost_history_of_releases_comes_back_from_the_record(tmp_path: Path) -> None:
    entries = [{"release": "0.1.0-aaaaaaaaaaaa", "since": "2026-01-01T00:00:00Z", "healthy": "2026-01-01T00:00:09Z"}]
    (tmp_path / "state.json").write_text(json.dumps({"manifest": entries}))
    assert releases.recovered_manifest(tmp_path / "state.json") == entries
    for text in ("", "[]", "{}", '{"manifest": 1}', '{"manifest": [1]}'):
        (tmp_path / "state.json").write_text(text)
        assert releases.recovered_manifest(tmp_path / "state.json") == []


class TestReleaseToKeep:
    """What a repair mends a release with: the one that the host was switched to last, from its own archive."""

    HERE: ClassVar = (f"{sys.version_info.major}.{sys.version_info.minor}", os.uname().machine)

    @pytest.fixture(autouse=True)
    def pythons(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(releases, "runs_here", lambda *target: target == self.HERE)

    @staticmethod
    def listed(target: tuple[str, str]) -> bytes:
        return json.dumps({"python": target[0], "arch": target[1], "files": {}}).encode()

    def archive(self, root: Path, version: str, target: tuple[str, str] = HERE) -> str:
        """Its name, with which it lies there as it should."""
        buffer, data = io.BytesIO(), self.listed(target)
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            entry = tarfile.TarInfo("RELEASE.json")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        name = f"{version}-{digest_of(buffer.getvalue())[:12]}"
        (root / "archives").mkdir(exist_ok=True)
        (root / f"archives/{name}.tar.gz").write_bytes(buffer.getvalue())
        return name

    @staticmethod
    def switched(root: Path, *activations: tuple[str, str]) -> None:
        """(release, "healthy", "failed" or "")…, oldest first; the link leads to the last."""
        told = [
            {"release": name, "since": "x", "healthy": "", **({word: "y"} if word else {})}
            for name, word in activations
        ]
        (root / "manifest.json").write_text(json.dumps(told))
        (root / "current").unlink(missing_ok=True)
        (root / "current").symlink_to(f"releases/{activations[-1][0]}")

    def test_by_its_archive(self, tmp_path: Path) -> None:
        name = self.archive(tmp_path, "1.0")
        path = tmp_path / f"archives/{name}.tar.gz"
        assert releases.kept(tmp_path, {"release": name}) == {"id": name, "sha256": digest_of(path.read_bytes())}
        for damaged in (b"other", path.read_bytes() + b"x"):
            path.write_bytes(damaged)
            assert releases.kept(tmp_path, {"release": name}) == {"id": name, "sha256": ""}
        path.unlink()
        assert releases.kept(tmp_path, {"release": name}) == {"id": name, "sha256": ""}

    def test_not_the_one_that_was_left_because_it_failed(self, tmp_path: Path) -> None:
        """A way back whose gate failed, or that was killed: the record still names the release that was left."""
        old, new = self.archive(tmp_path, "1.0"), self.archive(tmp_path, "2.0")
        self.switched(tmp_path, (old, "healthy"), (new, "failed"), (old, ""))
        assert releases.kept(tmp_path, {"release": new})["id"] == old
        self.switched(tmp_path, (old, "healthy"), (new, "failed"))
        assert releases.kept(tmp_path, {"release": new}) == {}
        assert releases.kept(tmp_path, {"release": old})["id"] == old

    def test_the_one_that_was_proven_though_nobody_recorded_the_host(self, tmp_path: Path) -> None:
        old, new = self.archive(tmp_path, "1.0"), self.archive(tmp_path, "2.0")
        self.switched(tmp_path, (old, "healthy"), (new, "healthy"))
        assert releases.kept(tmp_path, {"release": old})["id"] == new

    def test_a_manifest_that_names_what_was_never_here(self, tmp_path: Path) -> None:
        name = self.archive(tmp_path, "1.0")
        self.switched(tmp_path, (name, "healthy"), ("9.9-000000000000", ""))
        assert releases.kept(tmp_path, {"release": name})["id"] == name

    def test_a_lost_archive_is_no_reason_for_an_older_release(self, tmp_path: Path) -> None:
        old, new = self.archive(tmp_path, "1.0"), self.archive(tmp_path, "2.0")
        self.switched(tmp_path, (old, "healthy"), (new, "healthy"))
        (tmp_path / f"archives/{new}.tar.gz").unlink()
        (tmp_path / f"releases/{new}").mkdir(parents=True)
        assert releases.kept(tmp_path, {"release": old}) == {"id": new, "sha256": ""}

    def test_without_a_record_or_a_manifest(self, tmp_path: Path) -> None:
        assert releases.kept(tmp_path, {}) == {}
        name = self.archive(tmp_path, "1.0")
        (tmp_path / "current").symlink_to(f"releases/{name}")
        assert releases.kept(tmp_path, {})["id"] == name
        (tmp_path / "current").unlink()
        copy = [{"release": name, "since": "x", "healthy": "y"}]
        assert releases.kept(tmp_path, {"manifest": copy})["id"] == name

    def test_another_python_takes_another_release(self, tmp_path: Path) -> None:
        name = self.archive(tmp_path, "1.0", ("3.1", self.HERE[1]))
        assert releases.kept(tmp_path, {"release": name}) == {}
        (tmp_path / f"archives/{name}.tar.gz").unlink()
        (tmp_path / f"releases/{name}").mkdir(parents=True)
        (tmp_path / f"releases/{name}/RELEASE.json").write_bytes(self.listed(("3.1", self.HERE[1])))
        assert releases.kept(tmp_path, {"release": name}) == {}


@pytest.mark.parametrize(
    ("states", "status"),
    [
        (["clean", "clean"], 0),
        (["clean", "drifted", "not installed"], 2),
        (["clean", "not installed"], 3),
        (["drifted", "unreachable", "failed"], 4),
        (["drifted", "failed"], 1),
        ([], 1),
    ],
)
def test_one_exit_status_for_all_hosts(states: list[str], status: int) -> None:
    assert drift.exit_status(states) == status


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

    def test_a_host_without_python_is_told_from_other_failures(self) -> None:
        gone = {"module_stderr": "/bin/sh: 1: /usr/bin/python3: not found", "rc": 127}
        assert nox_report.without_python(gone)
        assert not nox_report.without_python({"msg": "python3-apt: not found in the archive"})

    def test_remedies_in_the_order_in_which_they_are_taken(self) -> None:
        found = {
            "owners": ["nox_logs"],
            "down": ["a"],
            "set_right": ["/x"],
            "stale": [],
            "stale_proxy": ["caddy.service"],
        }
        assert nox_report.remedies(found) == ["owners and modes", "nox_logs", "start a", "reload caddy.service"]

    def test_every_finding_is_in_the_table(self) -> None:
        hosts = {"b": nox_report.Host("drifted", [self.FOUND], left=[]), "a": nox_report.Host("clean")}
        text = nox_report.table(hosts, repairing=True)
        assert text.index("\na ") < text.index("\nb ")
        assert "mended  fail unit.failed nox-api.service: failed, not active" in text


class TestAttributes:
    def test_owner_and_mode_take_no_role(self) -> None:
        down = host_state.Finding("unit.inactive", "nox_service", "nox-api.service", "active", "inactive")
        found = [finding("nox_service", "path.mode"), down]
        assert (host_state.owners_of(found), host_state.right_paths(found)) == ([], ["x"])

    def test_the_record_is_written_again_anyway(self) -> None:
        assert host_state.owners_of([finding("nox_service", "record.mode")]) == []

    @pytest.mark.parametrize("deeper", ["path.changed", "user.missing"])
    def test_what_goes_deeper_takes_the_role(self, deeper: str) -> None:
        found = [finding("nox_logs", "path.owner"), finding("nox_logs", deeper)]
        assert (host_state.owners_of(found), host_state.right_paths(found)) == (["nox_logs"], [])

    def test_they_are_given_back_as_recorded(self, tmp_path: Path) -> None:
        path = tmp_path / "tool"
        path.write_text("x")
        owner = f"{path.owner()}:{path.group()}"
        record = {"sandbox": "/none", "paths": {str(path): {"kind": "file", "owner": owner, "mode": "0750"}}}
        host_state.set_right(str(path), record)
        assert path.stat().st_mode & 0o7777 == 0o750

    def test_a_link_in_the_place_is_not_followed(self, tmp_path: Path) -> None:
        target = tmp_path / "shadow"
        target.write_text("x")
        target.chmod(0o600)
        path = tmp_path / "tool"
        path.symlink_to(target)
        owner = f"{target.owner()}:{target.group()}"
        record = {"sandbox": "/none", "paths": {str(path): {"kind": "file", "owner": owner, "mode": "0777"}}}
        with pytest.raises(OSError, match="symbolic"):
            host_state.set_right(str(path), record)
        assert target.stat().st_mode & 0o7777 == 0o600
