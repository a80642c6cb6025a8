"""The lab's decisions: addresses, what a host takes over, inventory, whose process is whose."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lab import __main__ as cli
from lab import base, inherited, inventory, network, ssh, state
from lab.state import Host, Lab, LabError

ARCHIVE = "/usr/share/keyrings/debian-archive-keyring.gpg"


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees the labs of this machine."""
    monkeypatch.setattr(state, "STATE", tmp_path / "state")
    return tmp_path / "state"


def a_host(name: str = "nox1", lab: str = "lab", address: str = "10.77.0.11") -> Host:
    return Host(name, lab, "nspawn", "bookworm", address, "/base")


# --- names, addresses, networks ---


def test_the_lab_called_lab_gets_the_first_network() -> None:
    lab = Lab("lab", state.free_index("lab", set()))
    assert (lab.bridge, lab.subnet, lab.gateway) == ("br-nox", "10.77.0.0/24", "10.77.0.1")


def test_other_labs_get_the_next_free_network_and_leave_the_first() -> None:
    lab = Lab("demo", state.free_index("demo", {0, 1, 3}))
    assert (lab.bridge, lab.subnet) == ("br-nox2", "10.77.2.0/24")
    assert state.free_index("demo", set()) == 1


def test_a_taken_first_network_makes_way() -> None:
    assert state.free_index("lab", {0, 1}) == 2


def test_no_network_left_is_an_error() -> None:
    with pytest.raises(LabError, match=r"no 10\.77\.K\.0/24 is free"):
        state.free_index("lab", set(range(256)))


def test_bridge_names_fit_an_interface_name() -> None:
    assert all(len(state.bridge_name(index)) <= 15 for index in range(256))


def test_addresses_start_at_11_and_fill_gaps() -> None:
    lab = Lab("lab", 0)
    assert lab.free_address() == "10.77.0.11"
    for last in (11, 13):
        lab.hosts[f"h{last}"] = a_host(f"h{last}", address=f"10.77.0.{last}")
    assert lab.free_address() == "10.77.0.12"


def test_a_full_lab_says_how_to_go_on() -> None:
    lab = Lab("lab", 0)
    for _ in range(state.MAX_HOSTS):
        address = lab.free_address()
        lab.hosts[address] = a_host(address, address=address)
    assert address == "10.77.0.110"
    with pytest.raises(LabError, match="python3 -m lab down"):
        lab.free_address()


@pytest.mark.parametrize("name", ["lab", "m-default", "t1", "a" * 24])
def test_good_names(name: str) -> None:
    assert state.valid_name(name)


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a_b", "a.b", "../x", ".locks", "a" * 25])
def test_bad_names(name: str) -> None:
    assert not state.valid_name(name)


def test_routes_of_the_machine_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    routes = '[{"dst":"default"},{"dst":"10.77.4.0/22"},{"dst":"10.77.9.1"},{"dst":"10.0.0.0/8"}]'
    monkeypatch.setattr(network, "run", lambda *words, **options: routes)
    monkeypatch.setattr(network, "_INTERFACES", Path("/nonexistent"))
    assert network.taken_indexes() == {4, 5, 6, 7, 9}


def test_rules_are_marked_with_the_lab() -> None:
    for _, _, rule in network._rules(Lab("demo", 3)):
        assert "nox-lab:demo" in rule
        assert "br-nox3" in rule


# --- records ---


def test_a_lab_comes_back_from_its_record(own_state: Path) -> None:
    lab = Lab("demo", 2, {"nox1": a_host(lab="demo")}, "/somewhere")
    lab.save()
    assert state.load_lab("demo") == lab
    assert state.load_lab("other") is None
    assert state.lab_names() == ["demo"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "demo"}', '{"hosts": {"a": {"x": 1}}}'])
def test_a_broken_record_names_the_command_that_helps(own_state: Path, text: str) -> None:
    (own_state / "demo").mkdir(parents=True)
    (own_state / "demo/state.json").write_text(text)
    with pytest.raises(LabError, match="python3 -m lab down --lab demo"):
        state.load_lab("demo")


def test_locks_are_no_labs(own_state: Path) -> None:
    with state.locked("demo"):
        assert state.lab_names() == []


def test_directories_without_a_record_are_strays(own_state: Path) -> None:
    lab = Lab("demo", 2, {"nox1": a_host(lab="demo")})
    for name in ("nox1", "nox2"):
        (lab.dir / "hosts" / name).mkdir(parents=True)
    assert [host.name for host in lab.strays()] == ["nox2"]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with path.open() as reader:
        state.write_atomic(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


# --- processes ---


def test_a_pid_file_names_its_process_only_with_the_start_time(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    started = state.start_time(os.getpid())
    assert started is not None
    path.write_text(f"{os.getpid()} {started}\n")
    assert state.read_pid(path) == os.getpid()
    path.write_text(f"{os.getpid()} {started - 1}\n")  # the number was given to another process
    assert state.read_pid(path) is None


@pytest.mark.parametrize("text", ["", "12", "a b", "1 2 3"])
def test_a_broken_pid_file_names_no_process(tmp_path: Path, text: str) -> None:
    (tmp_path / "pid").write_text(text)
    assert state.read_pid(tmp_path / "pid") is None
    assert state.read_pid(tmp_path / "none") is None


def test_a_process_that_ended_has_no_start_time() -> None:
    with subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.DEVNULL) as child:
        # ended, but not yet waited for: a zombie
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert state.start_time(child.pid) is None
    assert state.start_time(child.pid) is None


def test_a_name_with_spaces_and_parentheses_does_not_confuse(tmp_path: Path) -> None:
    program = tmp_path / "a) S 1 (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "10"]) as child:
        try:
            own = state.start_time(os.getpid())
            other = state.start_time(child.pid)
            assert own is not None
            assert other is not None
            assert other >= own
        finally:
            child.kill()


# --- apt sources ---

DEB822 = """\
Types: deb deb-src
# a comment
URIs: http://mirror.example/debian/
Suites: bookworm bookworm-updates
Components: main non-free-firmware
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/security
Suites: bookworm-security
Components:
 main
 contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
Enabled: no
URIs: http://off.example/debian
Suites: bookworm
Components: main

Types: deb-src
URIs: http://source.example/debian
Suites: bookworm
Components: main

Types: deb
URIs: https://vendor.example/debian
Suites: bookworm
Components: main
Signed-By: /usr/share/keyrings/vendor.gpg
"""

ONE_LINE = """\
# deb http://off.example/ubuntu jammy main
deb-src http://source.example/ubuntu jammy main
deb [arch=amd64 signed-by=/usr/share/keyrings/vendor.gpg] https://vendor.example jammy main
deb http://mirror.example/ubuntu/ jammy main restricted universe # remark
deb http://mirror.example/ubuntu jammy-updates main universe
deb http://mirror.example/ubuntu jammy-backports main universe
deb http://security.example/ubuntu jammy-security main universe
"""


def test_deb822_sources_are_read() -> None:
    found = inherited.parse_deb822(DEB822)
    assert [(source.uri, source.suite) for source in found] == [
        ("http://mirror.example/debian/", "bookworm"),
        ("http://mirror.example/debian/", "bookworm-updates"),
        ("http://mirror.example/security", "bookworm-security"),
        ("https://vendor.example/debian", "bookworm"),
    ]
    assert found[2].components == ("main", "contrib")


def test_one_line_sources_are_read() -> None:
    found = inherited.parse_sources_list(ONE_LINE)
    assert [source.suite for source in found] == [
        "jammy",
        "jammy",
        "jammy-updates",
        "jammy-backports",
        "jammy-security",
    ]
    assert found[0].signed_by == "/usr/share/keyrings/vendor.gpg"
    assert found[1].components == ("main", "restricted", "universe")


@pytest.mark.parametrize("suite", ["bullseye", "bookworm", "trixie"])
def test_the_suite_is_replaced_in_debians_archives_only(suite: str) -> None:
    found = inherited.sources_for(suite, inherited.parse_deb822(DEB822))
    assert [source.line(Path(ARCHIVE)) for source in found] == [
        f"deb [signed-by={ARCHIVE}] http://mirror.example/debian/ {suite} main",
        f"deb [signed-by={ARCHIVE}] http://mirror.example/debian/ {suite}-updates main",
        f"deb [signed-by={ARCHIVE}] http://mirror.example/security {suite}-security main",
    ]


def test_ubuntus_archives_serve_ubuntus_suites() -> None:
    sources = inherited.parse_sources_list(ONE_LINE)
    found = inherited.sources_for("jammy", sources)
    assert [(source.uri, source.suite, source.components) for source in found] == [
        ("http://mirror.example/ubuntu/", "jammy", ("main", "universe")),
        ("http://mirror.example/ubuntu", "jammy-updates", ("main", "universe")),
        ("http://security.example/ubuntu", "jammy-security", ("main", "universe")),
    ]
    assert inherited.sources_for("bookworm", sources) == []


def test_a_newer_ubuntus_archives_serve_jammy() -> None:
    found = inherited.sources_for("jammy", inherited.parse_sources_list(ONE_LINE.replace("jammy", "noble")))
    assert [source.suite for source in found] == ["jammy", "jammy-updates", "jammy-security"]


def test_sources_of_a_machine(tmp_path: Path) -> None:
    """Disabled files, CDs and directories are left out; a mirror list gives its first address."""
    mirrors = tmp_path / "mirrors.list"
    mirrors.write_text("# comment\nhttp://first.example/debian/\tpriority:1\nhttp://second.example\n")
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    (tmp_path / "sources.list").write_text(
        "deb cdrom:[Debian]/ bookworm main\ndeb file:/srv/debian bookworm main\n"
        f"deb mirror+file:{mirrors} bookworm main\ndeb mirror+file:/none bookworm main\n"
    )
    (parts / "a.sources").write_text("Types: deb\nURIs: http://a.example/\nSuites: x\nComponents: main\n")
    (parts / "b.list.disabled").write_text("deb http://b.example x main\n")
    found = inherited.machine_sources(tmp_path)
    assert [source.uri for source in found] == ["http://first.example/debian", "http://a.example"]


def test_auto_is_jammy_only_where_it_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inherited, "machine_sources", lambda: inherited.parse_sources_list(ONE_LINE))
    monkeypatch.setattr(inherited, "reachable", lambda source: True)
    assert inherited.choose_suite("auto") == "jammy"
    assert inherited.choose_suite("trixie") == "trixie"
    monkeypatch.setattr(inherited, "reachable", lambda source: False)
    assert inherited.choose_suite("auto") == "bookworm"
    monkeypatch.setattr(inherited, "machine_sources", lambda: inherited.parse_deb822(DEB822))
    monkeypatch.setattr(inherited, "reachable", lambda source: pytest.fail("nothing to ask"))
    assert inherited.choose_suite("auto") == "bookworm"


def test_a_machine_without_the_archive_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inherited, "machine_sources", lambda: inherited.parse_sources_list(ONE_LINE))
    with pytest.raises(LabError, match="no archive of Debian"):
        base.recipe("bookworm", "nspawn")


def test_a_recipe_is_known_by_all_that_is_in_it() -> None:
    source = inherited.Source("http://mirror.example", "bookworm", ("main",))
    one = base.Recipe("bookworm", "nspawn", ("a",), (source,), "certificate", "")
    same = base.Recipe("bookworm", "nspawn", ("a",), (source,), "certificate", "")
    other = base.Recipe("bookworm", "nspawn", ("a",), (source,), "another certificate", "")
    assert one.prefix == same.prefix
    assert one.prefix.startswith("bookworm-nspawn-")
    assert one.prefix != other.prefix


# --- cached bases ---


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cache"
    path.mkdir()
    monkeypatch.setattr(base, "CACHE", path)
    return path


def a_base(cache: Path, age_days: float, kernel: str = "", name: str = "bookworm-nspawn-0123") -> Path:
    path = cache / f"{name}.{int(time.time() - age_days * 86400)}"
    (path / "root").mkdir(parents=True)
    (path / "recipe.json").write_text(json.dumps({"kernel": kernel}))
    return path


def a_recipe() -> base.Recipe:
    return base.Recipe("bookworm", "nspawn", (), (), "", "")


def test_a_fresh_base_is_used_and_an_old_one_renewed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = cache / "new"
    monkeypatch.setattr(base, "_build", lambda wanted, finish: built)
    assert base.base_for(a_recipe()) == built
    old = a_base(cache, base.MAX_AGE_DAYS + 1, name=a_recipe().prefix)
    assert base.base_for(a_recipe()) == built
    fresh = a_base(cache, 1, name=a_recipe().prefix)
    assert base.base_for(a_recipe()) == fresh
    assert old.exists()


def test_an_old_base_serves_when_it_cannot_be_renewed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(wanted: base.Recipe, finish: object) -> Path:
        raise LabError("no archive")

    monkeypatch.setattr(base, "_build", fail)
    with pytest.raises(LabError, match="no archive"):
        base.base_for(a_recipe())
    old = a_base(cache, base.MAX_AGE_DAYS + 1, name=a_recipe().prefix)
    assert base.base_for(a_recipe()) == old


def test_expired_bases_go_unless_a_host_stands_on_them(cache: Path) -> None:
    used, unused, young = a_base(cache, 30), a_base(cache, 31), a_base(cache, 1)
    kernel = cache / "kernel-uml-6.1um4+b13"
    kernel.mkdir()
    base.drop_expired({str(used)})
    assert used.exists()
    assert young.exists()
    assert kernel.exists()
    assert not unused.exists()


def test_purge_keeps_what_hosts_stand_on(cache: Path) -> None:
    used = a_base(cache, 1, kernel="kernel-uml-1.2", name="bookworm-uml-0123")
    unused = a_base(cache, 2)
    kernels = [cache / "kernel-uml-1.2", cache / "kernel-uml-1.1"]
    for path in [*kernels, cache / ".building-now"]:
        path.mkdir()
    assert base.purge({str(used)}) == [used.name, "kernel-uml-1.2"]
    assert [path.exists() for path in (used, unused, *kernels)] == [True, False, True, False]
    assert (cache / ".building-now").exists()
    (cache / ".building-now").rmdir()
    assert base.purge(set()) == []
    assert not cache.exists()


# --- apt and pip settings, certificates, name servers ---

DUMP = """\
APT::Keep-Downloaded-Packages "false";
DPkg::Post-Invoke:: "rm -f /var/cache/apt/archives/*.deb || true";
Acquire "";
Acquire::GzipIndexes "true";
Acquire::Languages:: "none";
Acquire::Check-Date "false";
Acquire::Retries "3";
Acquire::http "";
Acquire::http::Proxy "http://proxy.example:3128";
Acquire::http::Proxy::direct.example "DIRECT";
Acquire::http::Proxy-Auto-Detect "/usr/bin/find-a-proxy";
Acquire::https::Verify-Peer "true";
Acquire::https::CaInfo "/root/ca.pem";
"""


def test_apt_settings_are_those_that_reach_the_archive() -> None:
    assert inherited.apt_settings(DUMP, {"http_proxy": "http://ignored.example"}).splitlines() == [
        'Acquire::Check-Date "false";',
        'Acquire::Retries "3";',
        'Acquire::http::Proxy "http://proxy.example:3128";',
        'Acquire::http::Proxy::direct.example "DIRECT";',
        'Acquire::https::Verify-Peer "true";',
    ]


def test_the_environments_proxies_count_for_apt() -> None:
    environment = {"http_proxy": "http://a.example", "HTTPS_PROXY": "http://b.example"}
    assert inherited.apt_settings("", environment) == (
        'Acquire::http::Proxy "http://a.example";\nAcquire::https::Proxy "http://b.example";\n'
    )


def test_pip_takes_over_addresses_and_no_files() -> None:
    system = (
        "[global]\nindex-url = https://one.example/simple\nfind-links = /opt/wheels\n"
        "cert = /etc/ssl/certs/ca-certificates.crt\n[install]\nuser = yes\n"
    )
    user = "[global]\nextra_index_url = file:///opt/simple https://two.example/simple\ntimeout = 60\n"
    environment = {"PIP_INDEX_URL": "https://three.example/simple", "PIP_FIND_LINKS": "/opt/wheels"}
    assert inherited.pip_config([system, "no [ini", user], environment) == (
        "[global]\nindex-url = https://three.example/simple\n"
        "extra-index-url = https://two.example/simple\n"
        "cert = /etc/ssl/certs/ca-certificates.crt\ntimeout = 60\n"
    )


@pytest.mark.parametrize("text", ["", "[global]\ncert = /root/own.pem\nfind-links = /opt/wheels\n"])
def test_pip_without_addresses_needs_no_file(text: str) -> None:
    assert inherited.pip_config([text], {}) == ""


def test_certificates_compare_by_content() -> None:
    one = "-----BEGIN CERTIFICATE-----\nAAAA\nBBBB\n-----END CERTIFICATE-----\n"
    rewrapped = "-----BEGIN CERTIFICATE-----\nAAAABBBB\n-----END CERTIFICATE-----"
    two = one.replace("AAAA", "CCCC")
    both = inherited.certificates(f"# a name\n{one}\n{two}")
    assert both.keys() - inherited.certificates(rewrapped).keys() == {"CCCCBBBB"}
    assert both["CCCCBBBB"] == two


def test_name_servers_on_the_loopback_are_replaced_by_those_behind() -> None:
    stub = "# stub\nnameserver 127.0.0.53\noptions edns0\n"
    upstream = "nameserver 192.0.2.53\nnameserver fe80::1%eth0\nsearch example\n"
    assert inherited.resolver([stub, upstream]) == upstream
    assert inherited.resolver(["nameserver ::1\nnameserver 192.0.2.1\n"]) == "nameserver 192.0.2.1\n"
    assert inherited.resolver([stub]) == ""


# --- what a host is made of ---


def test_keys_are_for_their_owner_only() -> None:
    files = {file.path: file for file in base.host_files({"etc/ssh/x_key": "", "etc/hosts": ""}, "k")}
    assert files["etc/ssh/x_key"].mode == 0o600
    assert files["etc/hosts"].mode == 0o644
    assert files["root/.ssh/authorized_keys"].mode == 0o600
    assert files["home/admin/.ssh"].mode == 0o700
    assert files["home/admin/.ssh/authorized_keys"].owner == base.ADMIN_ID


def test_files_are_not_written_through_a_symlink(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("the machine's")
    root = tmp_path / "root"
    root.mkdir()
    (root / "resolv.conf").symlink_to(outside)
    me = os.getuid()
    base.write_files(root, [base.HostFile("resolv.conf", "the host's", 0o644, me)])
    assert outside.read_text() == "the machine's"
    assert (root / "resolv.conf").read_text() == "the host's"


# --- inventory ---


def made(tmp_path: Path, name: str = "demo") -> Lab:
    lab = Lab(name, 2, inventory=str(tmp_path / "inventory"))
    for number in (1, 2):
        host = a_host(f"nox{number}", name, f"10.77.2.{10 + number}")
        lab.hosts[host.name] = host
        host.dir.mkdir(parents=True)
        (host.dir / "ssh_host_ed25519_key.pub").write_text(f"ssh-ed25519 KEY{number} root@nox\n")
    return lab


def test_the_inventory_names_hosts_keys_and_kinds(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    lab = made(tmp_path)
    group = yaml.safe_load(inventory.hosts_yml(lab, tmp_path / ".known_hosts"))["nox"]
    assert group["hosts"]["nox2"] == {
        "ansible_host": "10.77.2.12",
        "ansible_control_path": f"{lab.hosts['nox2'].dir}/ssh-%%r",
        "ansible_ssh_extra_args": f"-o ControlPath={lab.hosts['nox2'].dir}/ssh-%r",
        "lab_kind": "nspawn",
        "lab_suite": "bookworm",
    }
    assert group["vars"]["ansible_user"] == "root"
    assert group["vars"]["ansible_ssh_private_key_file"] == str(lab.key)
    assert "StrictHostKeyChecking=yes" in group["vars"]["ansible_ssh_common_args"]
    assert f"UserKnownHostsFile={tmp_path}/.known_hosts" in group["vars"]["ansible_ssh_common_args"]


def test_known_hosts_pin_each_address(tmp_path: Path) -> None:
    assert inventory.known_hosts(made(tmp_path)) == ("10.77.2.11 ssh-ed25519 KEY1\n10.77.2.12 ssh-ed25519 KEY2\n")


def test_a_host_that_was_never_made_has_no_key(tmp_path: Path) -> None:
    lab = made(tmp_path)
    (lab.hosts["nox1"].dir / "ssh_host_ed25519_key.pub").unlink()
    assert inventory.known_hosts(lab) == "10.77.2.12 ssh-ed25519 KEY2\n"


def test_an_inventory_is_written_twice_and_removed_with_its_lab(tmp_path: Path) -> None:
    lab = made(tmp_path)
    inventory.write(lab)
    for directory in (tmp_path / "inventory", lab.dir / "inventory"):
        assert sorted(path.name for path in directory.iterdir()) == [".known_hosts", "hosts.yml"]
    assert inventory.owner(tmp_path / "inventory") == "demo"
    inventory.remove(lab)
    assert not (tmp_path / "inventory").exists()


def test_another_labs_inventory_is_not_removed(tmp_path: Path) -> None:
    mine, other = made(tmp_path), made(tmp_path, "other")
    inventory.write(mine)
    inventory.write(other)
    inventory.remove(mine)
    assert inventory.owner(tmp_path / "inventory") == "other"


def test_a_hand_written_inventory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "hosts.yml").write_text("all:\n  hosts: {}\n")
    with pytest.raises(LabError, match="--inventory"):
        inventory.owner(tmp_path)
    inventory.remove(Lab("demo", 2, inventory=str(tmp_path)))
    assert (tmp_path / "hosts.yml").exists()


def test_ssh_trusts_the_pinned_keys_only(tmp_path: Path) -> None:
    lab = made(tmp_path)
    words = ssh.command(lab, lab.hosts["nox1"])
    assert words[-1] == "root@10.77.2.11"
    assert "StrictHostKeyChecking=yes" in words
    assert f"UserKnownHostsFile={lab.dir}/inventory/.known_hosts" in words


@pytest.mark.parametrize(("greeting", "answers"), [(b"SSH-2.0-x\r\n", True), (b"220 mail\r\n", False), (b"", False)])
def test_only_an_ssh_banner_counts_as_an_answer(greeting: bytes, answers: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(greeting)

        thread = threading.Thread(target=serve)
        thread.start()
        found = ssh.answering(["127.0.0.1"], server.getsockname()[1], timeout=5)
        thread.join()
    assert found == ({"127.0.0.1"} if answers else set())


def test_silence_and_a_closed_port_are_no_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert ssh.answering(["127.0.0.1"], port, timeout=0.05) == set()
    assert ssh.answering(["127.0.0.1"], port, timeout=5) == set()


# --- command line ---


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["up", "-n", "0"],
        ["up", "-n", "101"],
        ["up", "-n", "2", "--hosts", "a,b"],
        ["up", "--hosts", "a,a"],
        ["up", "--hosts", "a,../b"],
        ["up", "--suite", "sid"],
        ["up", "--lab", "Bad_Name"],
        ["ssh"],
        ["fly"],
    ],
)
def test_bad_usage_is_exit_code_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2


def test_a_remote_command_keeps_its_options() -> None:
    arguments = cli.parser().parse_args(["ssh", "--lab", "demo", "nox1", "ls", "--lab", "-l"])
    assert arguments.lab == "demo"
    assert arguments.command == ["ls", "--lab", "-l"]


def test_a_machine_that_cannot_host_is_exit_code_4(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cli.main(["check"]) == 4
    assert capsys.readouterr().err.count("\n") == 1


def test_a_failure_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "check_machine", lambda: None)
    assert cli.main(["console", "nox1"]) == 1
    assert "there is no lab lab" in capsys.readouterr().err
