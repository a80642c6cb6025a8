"""Ubuntu 22.04, whose archive is out of reach for the lab: the roles' decisions and files, rendered with its facts."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
JAMMY: dict[str, Any] = {
    "id": "ubuntu",
    "release": "ubuntu-22.04",
    "pretty": "Ubuntu 22.04.5 LTS",
    "codename": "jammy",
    "arch": "x86_64",
    "python": "3.10",
    "systemd": 249,
    "booted_by_systemd": True,
    "root": True,
    "cores": 4,
    "hostname": "run1",
    "fqdn": "run1.example.org",
    "addresses": ["192.0.2.10", "2001:db8::10"],
    "free_mib": {"/opt": 9000, "/var": 9000, "/home": 9000},
    "ssh_session": True,
    "ssh_ports": [22],
    "listeners": [{"port": 22, "address": "0.0.0.0", "process": "sshd", "unit": "ssh.service"}],
    "sites": {"caddy": [], "nginx": []},
    "settings": {},
    "token": "absent",
    "lacks": {"audit": "", "modules": ""},
    "mounts": {"/dev/shm": ["nodev", "nosuid", "rw"]},
}
# Directives that came after systemd 249, by the release notes of systemd 250 to 257
TOO_NEW = """
ExitType LoadCredentialEncrypted SetCredentialEncrypted RestrictFileSystems RestrictNetworkInterfaces
StartupAllowedCPUs StartupAllowedMemoryNodes DefaultOOMScoreAdjust ExtensionDirectories StartupMemoryMax
StartupMemoryHigh StartupMemoryLow OpenFile MemoryZSwapMax LogFilterPatterns RestartSteps RestartMaxDelaySec
ImportCredential DelegateSubgroup MemoryKSM FileDescriptorStorePreserve RootEphemeral CoredumpReceive
SurviveFinalKillSignal ConditionSecurityX MemoryPressureWatch NFTSet PrivatePIDs BindLogSockets PrivateBPF
ProtectControlGroupsEx ExtraFileDescriptors RestartMode ManagedOOMMemoryPressureDurationSec LiveMountX
""".split()


def render(tmp_path: Path, host: dict[str, Any], **variables: Any) -> subprocess.CompletedProcess[str]:
    given = {"nox_preflight_found": {"host": host}, "render_to": str(tmp_path), **variables}
    (tmp_path / "given.json").write_text(json.dumps(given))
    return subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), "-i", "localhost,", str(ROOT / "tests/unit/render.yml")]
        + ["-e", f"@{tmp_path}/given.json"],
        env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def decided(tmp_path: Path, **variables: Any) -> dict[str, Any]:
    done = render(tmp_path, JAMMY, **variables)
    assert done.returncode == 0, done.stdout[-3000:]
    return dict(json.loads((tmp_path / "decided.json").read_text()))


def test_without_a_domain(tmp_path: Path) -> None:
    found = decided(tmp_path, ansible_host="192.0.2.10")
    assert found["caddy"] == "vendor", "22.04 has no Caddy of its own"
    assert found["pin"] == "dl.cloudsmith.io"
    assert found["url"] == "https://192.0.2.10"
    assert found["tls"] == "internal"
    assert found["san"][:2] == ["IP:192.0.2.10", "IP:2001:db8::10"]
    assert found["san"][2] == "DNS:run1.example.org"
    assert int(found["max_body"]) == (16 + 128) * 1024 * 1024
    site = (tmp_path / "nox-api.caddy").read_text()
    assert "https://192.0.2.10, https://[2001:db8::10], https://run1.example.org" in site
    assert "tls internal" in site
    assert "response_header_timeout 50s" in site
    runner = (tmp_path / "nox-runner.service").read_text()
    assert f"TasksMax={64 + (128 + 16) * 4}" in runner
    assert "RestrictSUIDSGID=yes" in runner
    nginx = (tmp_path / "nox-api.nginx").read_text()
    assert "server_name 192.0.2.10 [2001:db8::10] run1.example.org" in nginx


def test_with_a_domain(tmp_path: Path) -> None:
    found = decided(
        tmp_path,
        nox_domain="nox.example.org",
        nox_proxy_acme_email="ops@example.org",
        nox_timeout=600,
        nox_bind_addr="::",
    )
    assert (found["url"], found["tls"]) == ("https://nox.example.org", "acme")
    assert found["names"] == ["nox.example.org"]
    assert found["upstream"] == "[::1]:8080"
    assert found["certbot"][-1] == "--domain=nox.example.org"
    assert found["certbot"][found["certbot"].index("--email") + 1] == "ops@example.org"
    site = (tmp_path / "nox-api.caddy").read_text()
    assert "tls ops@example.org\n" in site, "an operator's own Caddyfile has no address"
    assert "http://nox.example.org, http://localhost, http://127.0.0.1 {" in site, "asked for on the host itself"
    assert "response_header_timeout 630s" in site
    front = (tmp_path / "nox-api.service").read_text()
    assert "IPAddressDeny" not in front, "an API that listens for others must be reachable"
    assert "TimeoutStopSec=615" in front


def test_hardening(tmp_path: Path) -> None:
    found = decided(tmp_path, nox_harden__by_key={"rc": 0}, nox_harden_never_ban=["192.0.2.99"])
    assert found["audit"] is True, "a machine's kernel has rules"
    assert found["sshd"]["PasswordAuthentication"] == "no"
    assert found["loose"] == ["/tmp", "/var/tmp", "/dev/shm"]
    updates = (tmp_path / "updates.conf").read_text()
    assert '"origin=Ubuntu,archive=${distro_codename}-security,label=Ubuntu";' in updates and "Debian" not in updates
    jail = (tmp_path / "jail.local").read_text()
    assert "ignoreip = 127.0.0.1/8 ::1 192.0.2.99" in jail and "port = 22\n" in jail
    assert jail.count("enabled = true") == 2
    assert "-w /etc/default/nox-api -p wa -k nox\n" in (tmp_path / "audit.rules").read_text()
    assert (tmp_path / "modprobe.conf").read_text().count("/bin/false") == 11
    words = "start /tmp=nosuid,nodev,noexec /var/tmp=nosuid,nodev /dev/shm=nosuid,nodev,noexec\n"
    assert words in (tmp_path / "nox-mounts.service").read_text()


def test_without_a_key_passwords_stay(tmp_path: Path) -> None:
    found = decided(tmp_path, nox_harden__by_key={"rc": 255, "unreachable": True})
    assert not {"PasswordAuthentication", "PermitRootLogin"} & set(found["sshd"])
    assert found["sshd"]["X11Forwarding"] == "no"


def test_units_use_nothing_newer_than_systemd_249(tmp_path: Path) -> None:
    decided(tmp_path)
    for unit in ("nox-api.service", "nox-runner.service", "nox-runner.socket"):
        used = set(re.findall(r"(?m)^([A-Z][A-Za-z]+)=", (tmp_path / unit).read_text()))
        assert len(used) > 5
        assert not used & set(TOO_NEW)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"release": "ubuntu-20.04", "pretty": "Ubuntu 20.04.6 LTS"}, "Ubuntu 20.04.6 LTS"),
        ({"arch": "riscv64"}, "riscv64"),
        ({"booted_by_systemd": False}, "started by systemd"),
        ({"root": False}, "--ask-become-pass"),
        ({"token": "placeholder"}, "openssl rand -hex 32"),
        ({"free_mib": {"/opt": 10, "/var": 9000, "/home": 9000}}, "/opt has 10 MiB free"),
        ({"ssh_ports": []}, "nox_firewall_ssh_ports"),
        (
            {"listeners": [{"port": 8080, "address": "0.0.0.0", "process": "java", "unit": "tomcat9.service"}]},
            "tomcat9.service",
        ),
        (
            {"listeners": [{"port": 443, "address": "0.0.0.0", "process": "apache2", "unit": "apache2.service"}]},
            "apache2",
        ),
        (
            {
                "listeners": [{"port": 443, "address": "::", "process": "nginx", "unit": "nginx.service"}],
                "sites": {"caddy": [], "nginx": ["/etc/nginx/sites-enabled/blog"]},
            },
            "/etc/nginx/sites-enabled/blog",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refusals_name_the_cause_and_the_way_out(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    host = copy.deepcopy(JAMMY) | change
    done = render(tmp_path, host)
    assert done.returncode != 0
    assert message in re.sub(r"\s+", " ", done.stdout)
    assert not (tmp_path / "nox-api.service").exists()


def test_a_placeholder_in_the_inventory_is_refused_unseen(tmp_path: Path) -> None:
    token = "replace-me-with-something-of-32-characters"
    done = render(tmp_path, JAMMY, nox_api_token=token)
    assert done.returncode != 0
    assert token not in done.stdout + done.stderr
    assert "openssl rand -hex 32" in re.sub(r"\s+", " ", done.stdout)
