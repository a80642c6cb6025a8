"""What the modules decide to do, without a host: units, firewall, pruning, names, sizes, keys."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from ansible_collections.nox.platform.plugins.filter.bytes import to_bytes
from ansible_collections.nox.platform.plugins.filter.names import alt_name, url_host
from ansible_collections.nox.platform.plugins.module_utils import (
    brought,
    host_files,
    release_files,
    releases,
    settings_file,
    units,
)
from ansible_collections.nox.platform.plugins.module_utils.digests import digest_of, digest_of_file
from ansible_collections.nox.platform.plugins.modules import (
    nox_accounts,
    nox_apt_key,
    nox_firewall,
    nox_host,
)


def unit(load: str = "loaded", active: str = "active", file: str = "enabled", reload: str = "no") -> dict[str, str]:
    return {"LoadState": load, "ActiveState": active, "UnitFileState": file, "NeedDaemonReload": reload}


class TestUnits:
    def test_nothing_to_do(self) -> None:
        assert units.plan({"a.service": unit()}, "started") == []

    def test_a_host_without_the_unit(self) -> None:
        assert units.plan({"a.service": unit("not-found", "inactive", "")}, "started") == [
            ["enable", "a.service"],  # which reloads systemd itself
            ["start", "a.service"],
        ]

    def test_a_unit_that_was_changed_on_disk(self) -> None:
        assert units.plan({"a.service": unit(reload="yes")}, "started") == [["daemon-reload"]]

    def test_masked_and_failed_units_come_back(self) -> None:
        found = {"a.service": unit("masked", "failed", "masked"), "b.service": unit()}
        assert units.plan(found, "started") == [
            ["unmask", "a.service"],
            ["enable", "a.service"],
            ["reset-failed", "a.service"],
            ["start", "a.service"],
        ]

    def test_stopping_what_is_not_there_is_nothing(self) -> None:
        assert units.plan({"a.service": unit("not-found", "inactive", "")}, "stopped") == []

    def test_a_reload_starts_nothing_that_is_down(self) -> None:
        assert units.plan({"a.service": unit(active="inactive")}, "reloaded") == []


class TestAccounts:
    ONE: ClassVar = {"name": "noxious", "comment": "of a test", "home": "/nonexistent", "shell": "/usr/sbin/nologin"}

    def known(self, monkeypatch: pytest.MonkeyPatch, **differs: Any) -> None:
        """The host has the user as it is to be, but for what is given, with the groups noxious (990) and other (55)."""
        user = {
            "pw_uid": 991,
            "pw_gid": 990,
            "pw_gecos": "of a test",
            "pw_dir": "/nonexistent",
            "pw_shell": "/usr/sbin/nologin",
        }
        monkeypatch.setattr(nox_accounts.pwd, "getpwnam", lambda _: SimpleNamespace(**user | differs))
        monkeypatch.setattr(nox_accounts.grp, "getgrnam", lambda _: SimpleNamespace(gr_gid=990))
        groups = {990: "noxious", 55: "other"}
        monkeypatch.setattr(nox_accounts.grp, "getgrgid", lambda number: SimpleNamespace(gr_name=groups[number]))

    def test_one_that_is_not_there(self) -> None:
        assert nox_accounts.group_plan("noxious", None) == [["groupadd", "--system", "noxious"]]
        assert nox_accounts.group_plan("noxious", 990) == [["groupadd", "--system", "--gid", "990", "noxious"]]
        ((program, *words),) = nox_accounts.user_plan(self.ONE, 991)
        assert program == "useradd" and words[-1] == "noxious"
        assert {"--no-create-home", "--system", "--uid", "991", "--gid", "--password", "!"} <= set(words)

    def test_one_that_is_right_is_left_alone_whatever_its_numbers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.known(monkeypatch)
        assert nox_accounts.group_plan("noxious", None) == nox_accounts.user_plan(self.ONE, None) == []
        assert nox_accounts.group_plan("noxious", 990) == nox_accounts.user_plan(self.ONE, 991) == []

    @pytest.mark.parametrize(
        ("differs", "words"),
        [
            ({"pw_shell": "/bin/bash"}, ["--shell", "/usr/sbin/nologin"]),
            ({"pw_gid": 55}, ["--gid", "noxious"]),
            ({"pw_gid": 77}, ["--gid", "noxious"]),  # a group that isn't there any more
            ({"pw_dir": "/root", "pw_gecos": ""}, ["--comment", "of a test", "--home", "/nonexistent"]),
        ],
    )
    def test_only_what_differs_is_set(
        self, monkeypatch: pytest.MonkeyPatch, differs: dict[str, Any], words: list[str]
    ) -> None:
        self.known(monkeypatch, **differs)
        assert nox_accounts.user_plan(self.ONE, None) == [["usermod", *words, "noxious"]]

    def test_numbers_are_changed_where_files_have_others(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.known(monkeypatch)
        assert nox_accounts.group_plan("noxious", 55) == [["groupmod", "--gid", "55", "noxious"]]
        assert nox_accounts.user_plan(self.ONE, 56) == [["usermod", "--uid", "56", "noxious"]]


class TestFirewall:
    def test_openings_come_before_the_lock(self) -> None:
        assert nox_firewall.plan([], [2222, 80], "accept", False, False) == [
            ["allow", "2222/tcp"],
            ["allow", "80/tcp"],
            ["default", "deny", "incoming"],
            ["--force", "enable"],
        ]

    @pytest.mark.parametrize("rule", ["allow 22/tcp", "allow 22", "limit 22/tcp", "allow in 22/tcp comment 'mine'"])
    def test_an_operators_own_rule_counts(self, rule: str) -> None:
        assert nox_firewall.plan([rule], [22], "drop", True, True) == []

    @pytest.mark.parametrize(
        "rule", ["deny 22/tcp", "allow from 10.0.0.0/8 to any port 22", "allow 2222/tcp", "allow 22/udp"]
    )
    def test_a_rule_that_opens_less_does_not(self, rule: str) -> None:
        assert nox_firewall.plan([rule], [22], "drop", True, True) == [["allow", "22/tcp"]]

    def test_rules_that_the_kernel_lost_are_loaded_again(self) -> None:
        assert nox_firewall.plan(["allow 22/tcp"], [22], "drop", True, False) == [["reload"]]


class TestPruning:
    def entries(self, *names: str, healthy: tuple[str, ...] = ()) -> list[dict[str, str]]:
        return [{"release": name, "healthy": "yes" if name in healthy else ""} for name in names]

    def test_the_last_healthy_release_stays_however_old(self) -> None:
        entries = self.entries("a", "b", "c", "d", healthy=("a",))
        assert releases.prunable(entries, ["a", "b", "c", "d"], "d", keep=2) == ["c", "b"]

    def test_order_is_the_records_not_the_names(self) -> None:
        entries = self.entries("z", "a", "m")
        assert releases.prunable(entries, ["a", "m", "z"], "m", keep=2) == ["z"]

    def test_unrecorded_releases_go_first(self) -> None:
        entries = self.entries("b", "c")
        assert releases.prunable(entries, ["a", "b", "c"], "c", keep=2) == ["a"]

    def test_failed_releases_go_before_healthy_ones(self) -> None:
        entries = self.entries("a", "b", "c", "d", healthy=("a", "b"))
        entries[2]["failed"] = "yes"
        assert releases.prunable(entries, ["a", "b", "c", "d"], "d", keep=3) == ["c"]


class TestWayBack:
    RECORD: ClassVar = [
        {"release": "a", "healthy": "yes"},
        {"release": "b", "healthy": "yes"},
        {"release": "c", "healthy": "", "failed": "yes"},
        {"release": "d", "healthy": ""},
    ]

    def test_the_last_other_healthy_one(self) -> None:
        assert releases.way_back(self.RECORD, ["a", "b", "c", "d"], "d", "") == ("b", "")
        assert releases.way_back(self.RECORD, ["a", "b", "c", "d"], "b", "") == ("a", "")

    def test_one_that_is_not_there_is_none(self) -> None:
        assert releases.way_back(self.RECORD, ["a", "c", "d"], "d", "") == ("a", "")
        assert releases.way_back(self.RECORD, ["c", "d"], "d", "")[0] == ""

    def test_a_failed_or_unproven_one_is_refused_by_name(self) -> None:
        for name in ("c", "d", "x"):
            assert releases.way_back(self.RECORD, ["a", "c", "d"], "a", name)[0] == ""

    def test_one_that_failed_later_is_no_way_back(self) -> None:
        record = [*self.RECORD, {"release": "b", "healthy": "", "failed": "yes"}]
        assert releases.way_back(record, ["a", "b"], "d", "") == ("a", "")


def test_kernel_addresses() -> None:
    assert nox_host._address("0100007F:1F90") == ("127.0.0.1", 8080)
    assert nox_host._address("00000000000000000000000001000000:0016") == ("::1", 22)


def test_loopback_listeners_of_sshd_are_forwardings() -> None:
    def one(port: int, address: str, process: str, name: str) -> dict[str, object]:
        return {"port": port, "address": address, "process": process, "unit": name}

    listening = [
        one(2222, "0.0.0.0", "sshd", "ssh.service"),
        one(6010, "127.0.0.1", "sshd", "session-1.scope"),
        one(80, "0.0.0.0", "caddy", "caddy.service"),
    ]
    ports = nox_host.ssh_ports(listening)
    assert 2222 in ports
    assert not {6010, 80} & set(ports)


def test_sizes() -> None:
    assert (to_bytes("16M"), to_bytes("1k"), to_bytes(5), to_bytes("2G")) == (16777216, 1024, 5, 2147483648)
    with pytest.raises(ValueError):
        to_bytes("much")


def test_names() -> None:
    assert [url_host(name) for name in ("::1", "10.0.0.1", "x.org")] == ["[::1]", "10.0.0.1", "x.org"]
    assert [alt_name(name) for name in ("::1", "10.0.0.1", "x.org")] == ["IP:::1", "IP:10.0.0.1", "DNS:x.org"]


class TestAptKey:
    PINNED = "65760C51EDEA2017CEA2CA15155B6D79CA56EA34"

    def test_only_the_pinned_key(self) -> None:
        assert nox_apt_key.problem([self.PINNED], 0, self.PINNED) == ""
        assert "pinned" in nox_apt_key.problem(["F" * 40], 0, self.PINNED)
        assert "pinned" in nox_apt_key.problem([self.PINNED, "F" * 40], 0, self.PINNED)
        assert "pinned" in nox_apt_key.problem([], None, self.PINNED)

    def test_only_one_that_can_still_sign(self) -> None:
        assert "expired" in nox_apt_key.problem([self.PINNED], 1766956560, self.PINNED)
        assert "expired" in nox_apt_key.problem([self.PINNED], None, self.PINNED)


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """An unpacked one of a link, a file, what was compiled of it, and a cache of pip's, which is nobody's."""
    places = ("lib/__pycache__", "site-packages/pip/__pycache__")
    for place in places:
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "c.pyc").write_text("compiled")
    (tmp_path / "lib/c").write_text("code")
    (tmp_path / "a").symlink_to("b")
    files = {"a": "-> b", "lib/c": digest_of_file(tmp_path / "lib/c")}
    (tmp_path / "RELEASE.json").write_text(json.dumps({"python": "3.10", "arch": "x86_64", "files": files}))
    release_files.write_made(tmp_path)
    assert release_files.release_problem(tmp_path)[0] == ""
    return tmp_path


@pytest.mark.parametrize("name", ["a", "lib/c", "lib/__pycache__/c.pyc", "lib/__pycache__/new.pyc", "lib/new"])
def test_release_problems_are_named(release: Path, name: str) -> None:
    problem, new = f"{name} is missing, changed or not of the release", "new" in name
    (release / name).unlink(missing_ok=True)
    assert release_files.release_problem(release)[0] == ("" if new else problem)
    assert release_files.changed_files(release) == []
    (release / name).write_text("something else")
    assert release_files.release_problem(release)[0] == problem
    assert release_files.changed_files(release) == [release / name]


def test_links_of_somebody_elses_are_kept_aside_too(release: Path) -> None:
    (release / "lib/theirs").symlink_to(release / "site-packages")
    assert release_files.changed_files(release) == [release / "lib/theirs"]


def test_what_pip_compiles_is_nobodys(release: Path) -> None:
    (release / "site-packages/pip/__pycache__/c.pyc").write_text("anew")
    (release / "site-packages/pip/_vendor/__pycache__").mkdir(parents=True)
    (release / "site-packages/pip/_vendor/__pycache__/x.pyc").write_text("anew")
    assert release_files.release_problem(release)[0] == ""


@pytest.mark.parametrize("name", ["RELEASE.json", "UNPACKED.json"])
@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", '"x"', "[{}]", '{"files": 3}', '{"python": "3.10", "arch": "a", "files": {"a": 1}}', "{"],
)
def test_a_list_that_says_nothing(release: Path, name: str, text: str) -> None:
    (release / name).write_text(text)
    assert release_files.release_problem(release)[0] == f"{name} is missing or unreadable"
    assert release_files.changed_files(release) == []


def test_a_shorter_list_hides_nothing(release: Path) -> None:
    listed = json.loads((release / "RELEASE.json").read_text())
    (release / "lib/c").write_text("changed")
    (release / "RELEASE.json").write_text(json.dumps({**listed, "files": {}}))
    assert release_files.release_problem(release)[0] == "RELEASE.json is missing, changed or not of the release"
    assert release / "lib/c" in release_files.changed_files(release)


def test_the_way_back_to_a_release_from_before_there_was_a_list_of_what_was_compiled(release: Path) -> None:
    (release / "UNPACKED.json").unlink()
    assert "UNPACKED.json" in release_files.release_problem(release)[0]
    assert release_files.brought_problem(release) == ""
    (release / "lib/c").write_text("changed")
    assert release_files.brought_problem(release) == "lib/c is missing or changed"
    (release / "RELEASE.json").unlink()
    assert "RELEASE.json" in release_files.brought_problem(release)


class TestUnpacking:
    @staticmethod
    def archive(*members: tuple[str, str | None, str]) -> bytes:
        """(name, content or None for a directory, target of a link)…"""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for name, content, target in members:
                entry = tarfile.TarInfo(name)
                entry.type = tarfile.SYMTYPE if target else tarfile.DIRTYPE if content is None else tarfile.REGTYPE
                entry.linkname, entry.mode, entry.size = target, 0o777, len(content or "")
                tar.addfile(entry, io.BytesIO((content or "").encode()))
        return buffer.getvalue()

    def test_what_was_written_is_told(self, tmp_path: Path) -> None:
        data = self.archive(("lib", None, ""), ("lib/c", "code", ""), ("a", "", "lib"))
        assert releases.extract(data, tmp_path) == {"lib/c": digest_of(b"code"), "a": "-> lib"}
        assert (tmp_path / "a/c").read_text() == "code"
        assert (tmp_path / "lib/c").stat().st_mode & 0o777 == 0o755, "nobody else may write"

    @pytest.mark.parametrize(
        "name", ["/etc/x", "../x", "lib/../../x", "a/x", "no/such/directory", "lib/.", "lib/..", ".."]
    )
    def test_nothing_gets_out_nor_through_a_link(self, tmp_path: Path, name: str) -> None:
        place = tmp_path / "scratch"
        place.mkdir()
        with pytest.raises(releases.Failed, match="refuses to unpack"):
            releases.extract(self.archive(("lib", None, ""), ("a", "", ".."), (name, "x", "")), place)
        assert {path.name for path in tmp_path.iterdir()} == {"scratch"}

    def test_a_disk_that_fills_is_noticed(self, tmp_path: Path) -> None:
        """A single write may end in the middle without an error."""
        code = (
            "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
            "from ansible_collections.nox.platform.plugins.module_utils import releases\n"
            f"releases.write({str(tmp_path / 'file')!r}, b'x' * 9000)\n"
        )
        words = [sys.executable, "-c", f"import tests.unit.conftest\n{code}"]
        done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True)
        assert done.returncode != 0 and "File too large" in done.stderr, done.stderr

    @pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
    def test_only_files_directories_and_links(self, tmp_path: Path, kind: bytes) -> None:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            entry = tarfile.TarInfo("x")
            entry.type = kind
            tar.addfile(entry)
        with pytest.raises(releases.Failed, match="refuses to unpack"):
            releases.extract(buffer.getvalue(), tmp_path)

    def test_only_what_its_list_has_and_all_of_it(self, tmp_path: Path) -> None:
        listed = {"python": "3.10", "arch": "x86_64", "files": {"c": digest_of(b"code")}}
        for content, wrong in ((("c", "other", ""), "c"), (("d", "code", ""), "c"), (("e/", None, ""), "c")):
            data = self.archive(("RELEASE.json", json.dumps(listed), ""), content)
            (tmp_path / "archive").write_bytes(data)
            with pytest.raises(releases.Failed, match=f"{wrong} is not as its list says"):
                releases.unpack(tmp_path, tmp_path / "archive", digest_of(data), tmp_path / "releases/1")
            assert list((tmp_path / "releases").iterdir()) == []


class TestCarryingOver:
    """What was compiled for an earlier release, for the next one."""

    SOURCES = ("lib/same.py", "lib/changed.py", "lib/damaged.py", "lib/lost.py")

    @pytest.fixture
    def earlier(self, tmp_path: Path) -> Path:
        place = tmp_path / "releases/1"
        (place / "lib/__pycache__").mkdir(parents=True)
        for source in self.SOURCES:
            (place / source).write_text(source)
            (place / f"lib/__pycache__/{Path(source).stem}.cpython-310.pyc").write_text(f"compiled {source}")
        files = {source: digest_of_file(place / source) for source in self.SOURCES}
        (place / "RELEASE.json").write_text(json.dumps({"python": "3.10", "arch": "x86_64", "files": files}))
        release_files.write_made(place)
        (place / "lib/__pycache__/damaged.cpython-310.pyc").write_text("compiled lib/damaged.pX")
        (place / "lib/__pycache__/lost.cpython-310.pyc").unlink()
        return place

    def carried(self, root: Path) -> set[str]:
        (root / "scratch/lib").mkdir(parents=True)
        sources = {source: digest_of(source.encode()) for source in self.SOURCES}
        return releases.carry_over(
            [root / "releases/1"], root / "scratch", {**sources, "lib/changed.py": "1", "lib/new.py": "2"}
        )

    def test_of_the_same_source_and_undamaged(self, earlier: Path, tmp_path: Path) -> None:
        assert self.carried(tmp_path) == {"lib/same.py"}
        assert [path.name for path in (tmp_path / "scratch/lib/__pycache__").iterdir()] == ["same.cpython-310.pyc"]

    @pytest.mark.parametrize("name", ["RELEASE.json", "UNPACKED.json"])
    def test_nothing_of_a_release_whose_lists_are_not_as_they_were(
        self, earlier: Path, tmp_path: Path, name: str
    ) -> None:
        listed = json.loads((earlier / name).read_text())
        (earlier / name).write_text(json.dumps({**listed, "RELEASE.json": "another"}))
        assert self.carried(tmp_path) == set()

    @pytest.mark.parametrize("name", ["UNPACKED.json", "lib/__pycache__/same.cpython-310.pyc", "lib", "."])
    def test_nothing_of_a_release_that_others_could_write(self, earlier: Path, tmp_path: Path, name: str) -> None:
        """Who can write the list can write what it lists: planted code must not outlive a repair."""
        (earlier / name).chmod(0o777)
        assert self.carried(tmp_path) == set()

    def test_what_is_replaced_is_no_source(
        self, earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[list[Path]] = []
        monkeypatch.setattr(releases, "carry_over", lambda others, *_: asked.append(others) or set())
        monkeypatch.setattr(releases, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "", ""))
        release = {"python": "3.10", "files": {"venv/lib/python3.10/site-packages/a.py": "x"}}
        (tmp_path / "releases/2").mkdir()
        for name in ("1", "2", "3"):
            releases.compile_all(tmp_path, tmp_path / "scratch", tmp_path / "releases" / name, release)
        assert [[path.name for path in others] for others in asked] == [["2"], ["1"], ["1", "2"]]

    def test_nothing_where_no_digests_were_kept(self, earlier: Path, tmp_path: Path) -> None:
        listed = json.loads((earlier / "UNPACKED.json").read_text())
        del listed["digests"]
        (earlier / "UNPACKED.json").write_text(json.dumps(listed))
        assert self.carried(tmp_path) == set()


@pytest.mark.parametrize("text", ["", "[]", "null", '"x"', '{"values": 4}', "{"])
def test_settings_of_which_nothing_is_on_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.json").write_text(text)
    assert settings_file.read_written(tmp_path / "settings.json") == {}
    assert settings_file.read_written(tmp_path / "nothing") == {}


def test_what_was_brought_keeps_its_good_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brought, "PATH", tmp_path / "brought.json")
    brought.PATH.write_text('{"packages": 5, "ufw": ["allow 22/tcp"], "host_files": [], "kernel": 3}')
    assert brought.read() == {"ufw": ["allow 22/tcp"]}
    assert host_files.recorded() == {}
    brought.PATH.write_text('{"host_files": {"/a": 1, "/b": {"was": null}}}')
    assert host_files.recorded() == {"/b": {"was": None}}
    brought.remember("packages", ["caddy"])
    assert brought.read()["packages"] == ["caddy"]
