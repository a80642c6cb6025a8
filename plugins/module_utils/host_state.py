# SPDX-License-Identifier: Apache-2.0
"""A whole host against what Nox's roles recorded when they last made it true.

The module nox_state and, on the host itself, nox-debug say what it finds. So it and what it imports need the standard
library alone, run on Python 3.9, and import each other relatively: role nox_tools installs them as a package.
"""

from __future__ import annotations

import array
import fcntl
import grp
import json
import os
import pwd
import re
import shutil
import socket
import ssl
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import host_files, kernel_settings, releases
from .commands import run
from .digests import digest_of, digest_of_file
from .release_files import changed_files, read_manifest, read_release, release_problem
from .settings_file import LINE, parse_settings, token_state
from .units import show as show_units

VERSION = 1  # of the record's shape; another one counts as no record
ROLES = (
    "nox_account",
    "nox_release",
    "nox_logs",
    "nox_service",
    "nox_firewall",
    "nox_proxy",
    "nox_tools",
    "nox_harden",
)
OPERATOR = "operator"
FAIL = "fail"
WARN = "warn"

ROOT = Path("/opt/nox")
CONFIG = Path("/etc/default/nox-api")
LOG_DIR = Path("/var/log/nox-api")
MANIFEST = ROOT / "manifest.json"
RECORD = "/var/lib/nox/state.json"
UNIT_DIR = "/etc/systemd/system"
RUNNER_SOCKET = "/run/nox-runner.sock"
CADDY_ADMIN = "/var/lib/caddy/admin.sock"
CADDYFILE = "/etc/caddy/Caddyfile"
NOX_UNITS = ("nox-runner.socket", "nox-runner.service", "nox-api.service")
ACCOUNTS = ("nox-api", "nox")

# What a module does that a host can run by itself (plugins/plugin_utils/on_host.py), and what that imports, as role nox_tools
# installs it: nox-debug runs it, too.
PACKAGE = (
    "__init__",
    "archives",
    "brought",
    "commands",
    "digests",
    "host_files",
    "host_gate",
    "host_state",
    "host_status",
    "kernel_settings",
    "local_api",
    "release_files",
    "releases",
    "settings_file",
    "units",
)

# Path → the role that makes it, and whether its content is the role's alone.
PATHS: dict[str, tuple[str, bool]] = {
    "/home/nox": ("nox_account", False),
    "/home/nox/nox": ("nox_account", False),
    "/opt/nox": ("nox_release", False),
    "/opt/nox/archives": ("nox_release", False),
    "/opt/nox/releases": ("nox_release", False),
    "/opt/nox/current": ("nox_release", True),
    "/opt/nox/.venv": ("nox_release", True),
    "/opt/nox/manifest.json": ("nox_release", False),
    "/var/log/nox-api": ("nox_logs", False),
    "/etc/logrotate.d/nox-api": ("nox_logs", True),
    "/etc/default/nox-api": ("nox_service", False),
    "/var/lib/nox": ("nox_service", False),
    "/var/lib/nox/settings.json": ("nox_service", False),
    "/var/lib/nox-api": ("nox_service", False),
    "/var/lib/nox-api/history": ("nox_service", False),
    "/var/lib/nox-api/history/HEAD": ("nox_service", True),
    "/var/lib/nox-api/history/config": ("nox_service", True),
    "/var/lib/nox-api/history/shallow": ("nox_service", True),
    "/var/lib/nox-api/history/objects": ("nox_service", False),
    "/var/lib/nox-api/history/refs": ("nox_service", False),
    **{f"{UNIT_DIR}/{unit}": ("nox_service", True) for unit in NOX_UNITS},
    "/usr/local/bin/nox-debug": ("nox_tools", True),
    "/usr/local/bin/nox-monitor": ("nox_tools", True),
    "/usr/local/share/nox": ("nox_tools", False),
    "/usr/local/share/nox/nox-debug.fr": ("nox_tools", True),
    "/usr/local/share/nox/host_state": ("nox_tools", False),
    **{f"/usr/local/share/nox/host_state/{name}.py": ("nox_tools", True) for name in PACKAGE},
    "/usr/local/share/nox/tests": ("nox_tools", False),
    **{
        f"/usr/local/share/nox/tests/{name}": ("nox_tools", True)
        for name in ("smoke.sh", "smoke_lib.sh", "test_health.sh", "test_put.sh", "test_run_py.sh", "test_run_sh.sh")
    },
}
PROXY_PATHS: dict[str, dict[str, tuple[str, bool]]] = {
    "caddy": {
        CADDYFILE: ("nox_proxy", True),
        "/etc/caddy/sites-enabled": ("nox_proxy", False),
        "/etc/caddy/sites-enabled/nox-api.caddy": ("nox_proxy", True),
    },
    "nginx": {
        "/etc/nginx/sites-available/nox-api": ("nox_proxy", True),
        "/etc/nginx/sites-enabled/nox-api": ("nox_proxy", True),
    },
    "none": {},
}
# Where a certificate of the operator's own, or Nginx's self-signed one, lies; recorded when it is there.
TLS_PATHS = {
    "/etc/nox": ("nox_proxy", False),
    "/etc/nox/tls": ("nox_proxy", False),
    "/etc/nox/tls/server.crt": ("nox_proxy", True),
    "/etc/nox/tls/server.key": ("nox_proxy", True),
}
PACKAGES = {
    "logrotate": "nox_logs",
    "bubblewrap": "nox_service",
    "ca-certificates": "nox_service",
    "curl": "nox_service",
    "libseccomp2": "nox_service",
}
# What stands and falls with a file of nox_harden: packages, units. A host that was never hardened has none of them.
HARDENED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "/etc/fail2ban/jail.d/nox.local": (("fail2ban",), ("fail2ban.service",)),
    "/etc/audit/rules.d/nox.rules": (("auditd",), ("auditd.service",)),
    "/etc/apt/apt.conf.d/52nox-updates": (
        ("unattended-upgrades",),
        ("apt-daily.timer", "apt-daily-upgrade.timer"),
    ),
    "/etc/systemd/system/nox-mounts.service": ((), ("nox-mounts.service",)),
}
LEAST_FREE = 0.03  # of a file system's space or inodes: below this runs and uploads begin to fail
IMMUTABLE = 0x10  # FS_IMMUTABLE_FL of include/uapi/linux/fs.h
GETFLAGS = 0x80086601  # FS_IOC_GETFLAGS there, on 64-bit hosts
SETFLAGS = 0x40086602  # FS_IOC_SETFLAGS there, on 64-bit hosts
CLOCK_SLACK = 2.0  # seconds; a process's start is known to the second only
CLOCK_BEHIND = 300.0  # seconds that the clock may be behind the record, which was written in the past
LOGS_LARGE = 1 << 30  # bytes in the log directory: rotation doesn't work, or nobody can read that much
# What the record itself is enough to mend.
ATTRIBUTES = ("path.owner", "path.mode", "path.immutable")
# What is mended by starting or restarting a unit; everything else takes the role that made it.
ONLY_DOWN = (
    "unit.failed",
    "unit.inactive",
    "unit.disabled",
    "unit.masked",
    "unit.reload",
    "unit.stale",
    "socket.closed",
    "proxy.stale",
)


class Finding(NamedTuple):  # a dataclass would take a tenth of the check to import
    """One difference. `what` is a path, a unit, an account, a package or a port; `since` is empty where nothing tells."""

    id: str
    owner: str
    what: str
    expected: str
    found: str
    severity: str = FAIL
    since: str = ""


Findings = Iterator[Finding]
Record = dict[str, Any]


# ── Paths


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def kind_of(mode: int) -> str:
    for test, name in ((stat.S_ISREG, "file"), (stat.S_ISDIR, "directory"), (stat.S_ISLNK, "link")):
        if test(mode):
            return name
    return "special"


def immutable(path: str) -> bool:
    """Whether chattr +i was set; file systems without such flags say no."""
    try:
        with open(path, "rb") as handle:  # noqa: PTH123
            flags = array.array("L", [0])
            fcntl.ioctl(handle, GETFLAGS, flags)
            return bool(flags[0] & IMMUTABLE)
    except OSError:
        return False


def describe(path: str, content: bool) -> dict[str, str]:
    """What is recorded of a path; empty where there is nothing."""
    try:
        status = os.lstat(path)
    except OSError:
        return {}
    kind = kind_of(status.st_mode)
    found = {"kind": kind, "owner": f"{user_name(status.st_uid)}:{group_name(status.st_gid)}"}
    if kind != "link":
        found["mode"] = f"{stat.S_IMODE(status.st_mode):04o}"
    if content and kind == "link":
        found["content"] = os.readlink(path)
    elif content and kind == "file":
        found["content"] = digest_of_file(Path(path))
    return found


def compare_path(path: str, wanted: dict[str, str]) -> Findings:
    """One path against its entry in the record."""
    role = wanted["role"]
    found = describe(path, "content" in wanted)
    if not found:
        yield Finding("path.missing", role, path, wanted["kind"], "nothing")
        return
    if found["kind"] != wanted["kind"]:
        yield Finding("path.kind", role, path, wanted["kind"], found["kind"])
        return
    if found.get("content") != wanted.get("content"):
        shown = (wanted["content"], found["content"]) if found["kind"] == "link" else ("as installed", "changed")
        yield Finding("path.changed", role, path, *shown)
    if found["owner"] != wanted["owner"]:
        yield Finding("path.owner", role, path, wanted["owner"], found["owner"])
    if found.get("mode") != wanted.get("mode"):
        yield Finding("path.mode", role, path, wanted["mode"], found["mode"])
    if found["kind"] in ("file", "directory") and immutable(path):
        yield Finding("path.immutable", role, path, "changeable by root", "chattr +i")


def caddyfile_is_ours() -> bool:
    try:
        return "managed by Ansible, role nox_proxy" in Path(CADDYFILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def managed_paths(about: dict[str, Any], sandbox: str) -> dict[str, tuple[str, bool]]:
    paths = {**PATHS, **PROXY_PATHS[about.get("proxy", "none")], sandbox: ("nox_service", False)}
    # of somebody else's file, one line of which is ours, only that it is there
    paths.update({path: ("nox_harden", "line" not in entry) for path, entry in host_files.recorded().items()})
    if about.get("proxy", "none") != "none":
        paths.update(TLS_PATHS)
    if CADDYFILE in paths and not caddyfile_is_ours():
        paths[CADDYFILE] = ("nox_proxy", False)  # the operator's: only that it is there
    return paths


# ── Accounts and packages


def account(name: str) -> dict[str, Any]:
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return {}
    return {
        "uid": entry.pw_uid,
        "gid": entry.pw_gid,
        "group": group_name(entry.pw_gid),
        "home": entry.pw_dir,
        "shell": entry.pw_shell,
        "groups": sorted(group.gr_name for group in grp.getgrall() if name in group.gr_mem),
    }


def compare_accounts(wanted: dict[str, dict[str, Any]]) -> Findings:
    for name, entry in wanted.items():
        found = account(name)
        if not found:
            yield Finding("user.missing", "nox_account", name, f"uid {entry['uid']}", "nothing")
        for key, value in entry.items():
            if found and found[key] != value:
                yield Finding(f"user.{key}", "nox_account", name, str(value), str(found[key]))


def compare_packages(wanted: dict[str, str]) -> Findings:
    ran = run("dpkg-query", "--show", "--showformat", "${Package} ${db:Status-Status}\n", *wanted)
    states = dict(line.split(" ", 1) for line in ran.stdout.splitlines() if " " in line)
    for name, role in wanted.items():
        if states.get(name) != "installed":
            yield Finding("package.missing", role, name, "installed", states.get(name, "not installed"))


# ── Hardening


def hardened() -> bool:
    """Whether nox_harden has been here, its own record lost or not."""
    return bool(host_files.recorded()) or any(Path(path).exists() for path in HARDENED)


def tied_down() -> dict[str, str]:
    """Directory → options, as nox-mounts.service is to mount them."""
    unit = host_files.read("/etc/systemd/system/nox-mounts.service") or ""
    return dict(re.findall(r" (/\S+)=(\S+)", "".join(re.findall(r"(?m)^ExecStart=.*", unit))))


def compare_hardening(wanted: dict[str, Any]) -> Findings:
    """What the kernel has, not what the files say."""
    for name, value in wanted.get("kernel", {}).items():
        found = kernel_settings.value(name)
        if found != value:
            yield Finding("kernel.value", "nox_harden", name, value, "nothing" if found is None else found)
    there = host_files.mounts()
    for place, options in wanted.get("mounts", {}).items():
        lacking = [one for one in options.split(",") if one not in there.get(place, set())]
        if lacking:
            yield Finding("mount.options", "nox_harden", place, options, f"without {','.join(lacking)}")
    for path, entry in wanted.get("lines", {}).items():
        if entry not in read_text(path).splitlines():
            yield Finding("path.line", "nox_harden", path, entry, "another line")


# ── Settings


def compare_settings(patterns: dict[str, str]) -> Findings:
    """The syntax only: any usable value is the operator's right."""
    try:
        text = CONFIG.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return  # the paths say so
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = LINE.match(line)
        if not match:
            # never the line itself: it may be half a token
            yield Finding("settings.line", "nox_service", f"{CONFIG}:{number}", "KEY=value", "not readable")
        elif match.group(1) in patterns:
            name = match.group(1)
            value = parse_settings(line)[name]
            if not re.fullmatch(patterns[name], value):
                yield Finding("settings.value", "nox_service", f"{CONFIG}:{name}", patterns[name], value[:60])
    settings = parse_settings(text)
    for name in patterns:
        if name not in settings:
            yield Finding("settings.missing", "nox_service", f"{CONFIG}:{name}", "a value", "nothing", WARN)
    token = token_state(settings.get("NOX_API_TOKEN"))
    if token != "ok":
        # A missing one is made again; a bad one was somebody's choice, and only they can say what was meant.
        owner = "nox_service" if token == "absent" else OPERATOR
        yield Finding("settings.token", owner, f"{CONFIG}:NOX_API_TOKEN", "ok", token)


# ── Release


def compare_release(recorded: str) -> Findings:
    role = "nox_release"
    current = ROOT / "current"
    directory = ROOT / "releases" / recorded
    for leftover in sorted(ROOT.glob("releases/.*")):
        yield Finding("release.leftover", role, str(leftover), "nothing", "a half-done release", WARN)
    if not directory.is_dir():
        yield Finding("release.missing", role, recorded, "unpacked", "nothing")
        return
    problem, loose = release_problem(directory)
    if problem:
        yield Finding("release.damaged", role, recorded, "as its list says", problem)
    elif loose:
        yield Finding("release.writable", role, recorded, "root alone may change it", loose)
    else:
        about = read_release(directory)
        python = (current / "venv/bin/python3").resolve()
        if current.exists() and (not os.access(python, os.X_OK) or python.name != f"python{about['python']}"):
            yield Finding("release.python", role, recorded, f"Python {about['python']}", f"{python} is none")
    archive = ROOT / f"archives/{recorded}.tar.gz"
    try:
        digest = digest_of_file(archive)
        if not digest.startswith(recorded.rpartition("-")[2]):
            yield Finding("release.archive", role, str(archive), recorded, f"SHA-256 {digest[:12]}", WARN)
    except OSError:
        yield Finding("release.archive", role, str(archive), "a file", "nothing", WARN)
    yield from compare_manifest(recorded)


def compare_manifest(recorded: str) -> Findings:
    path = MANIFEST
    try:
        last = json.loads(path.read_text(encoding="utf-8"))[-1]
        found, healthy = str(last["release"]), bool(last["healthy"])
    except FileNotFoundError:
        return  # the paths say so
    except (OSError, ValueError, LookupError, TypeError):
        yield Finding("release.manifest", "nox_release", str(path), f"ends with {recorded}", "not readable")
        return
    if found != recorded:
        yield Finding("release.manifest", "nox_release", str(path), f"ends with {recorded}", f"ends with {found}")
    elif not healthy:
        yield Finding("release.unproven", "nox_release", recorded, "seen healthy", "never", WARN)


# ── Units and sockets


def started(pid: str) -> float:
    """When a process was started, seconds since the epoch, by the kernel; 0.0 if it is gone."""
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19])
        boot = re.search(r"(?m)^btime (\d+)", Path("/proc/stat").read_text(encoding="ascii"))
    except (OSError, IndexError, ValueError):
        return 0.0
    return (int(boot.group(1)) if boot else 0) + ticks / os.sysconf("SC_CLK_TCK")


def modified(path: str) -> float:
    try:
        return os.lstat(path).st_mtime
    except OSError:
        return 0.0


def compare_unit(name: str, role: str, unit: dict[str, str]) -> Findings:
    """One unit's own state; at most one finding about why it isn't up, one about the next start."""
    load, active, enabled = unit["LoadState"], unit["ActiveState"], unit["UnitFileState"]
    if load == "masked" or enabled.startswith("masked"):
        yield Finding("unit.masked", role, name, "enabled", "masked")
        return
    if load == "not-found":
        yield Finding("unit.missing", role, name, "loaded", load)
        return
    if active == "failed":
        yield Finding("unit.failed", role, name, "active", "failed")
    elif active not in ("active", "reloading"):
        yield Finding("unit.inactive", role, name, "active", f"{active} ({unit['SubState']})")
    if enabled not in ("enabled", "static", "alias"):
        yield Finding("unit.disabled", role, name, "enabled", enabled, WARN)
    if unit["NeedDaemonReload"] == "yes":
        yield Finding("unit.reload", role, name, "the unit file as loaded", "changed since", WARN)


def compare_units(wanted: dict[str, str], units: dict[str, dict[str, str]], differing: set[str]) -> Findings:
    """Every unit; whether it runs something old is asked of files that are as recorded only."""
    for name, role in wanted.items():
        if name not in units:
            yield Finding("unit.unknown", role, name, "an answer of systemd", "none")
            continue
        found = list(compare_unit(name, role, units[name]))
        yield from found
        if found or units[name]["ActiveState"] != "active":
            continue
        pid = units[name].get("MainPID", "0")
        since = started(pid) if name in NOX_UNITS and pid != "0" else 0.0
        for what in (f"{UNIT_DIR}/{name}", str(ROOT / "current")):
            # A time that is still to come says only that the clock was set back.
            if since and what not in differing and since + CLOCK_SLACK < modified(what) <= time.time():
                yield Finding("unit.stale", role, name, f"started after {what} was changed", "started before")
                break


def listening() -> tuple[set[int], set[str]]:
    """TCP ports and Unix socket paths that somebody listens on, as the kernel says."""
    ports: set[int] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        ports |= {int(column[1].rpartition(":")[2], 16) for column in map(str.split, lines) if column[3] == "0A"}
    try:
        lines = Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace").splitlines()[1:]
    except OSError:
        lines = []
    return ports, {column[7] for column in map(str.split, lines) if len(column) > 7}


def compare_sockets(units: dict[str, dict[str, str]], proxy: str) -> Findings:
    """What is up must also be reachable. What is down has its finding already."""

    def up(name: str) -> bool:
        return units.get(name, {}).get("ActiveState") == "active"

    ports, sockets = listening()
    try:
        settings = parse_settings(CONFIG.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        settings = {}
    port = settings.get("NOX_PORT", "")
    if up("nox-api.service") and port.isdigit() and int(port) not in ports:
        yield Finding("socket.closed", "nox_service", "nox-api.service", f"listens on {port}", "doesn't")
    if up("nox-runner.socket"):
        wanted = {"kind": "special", "owner": "nox-api:nox-api", "mode": "0600"}
        if RUNNER_SOCKET not in sockets or describe(RUNNER_SOCKET, False) != wanted:
            found = describe(RUNNER_SOCKET, False)
            shown = f"{found['owner']} {found['mode']}" if found else "nothing"
            yield Finding("socket.closed", "nox_service", "nox-runner.socket", f"{RUNNER_SOCKET}, the front's", shown)
    if proxy != "none" and up(f"{proxy}.service"):
        for number in (80, 443):
            if number not in ports:
                yield Finding("socket.closed", "nox_proxy", f"{proxy}.service", f"listens on {number}", "doesn't")


# ── Firewall


def compare_firewall(ports: list[int], rules: str, boot: str, status: int = 0) -> Findings:
    """`iptables -S` against the ports that must be open; everything else closed. Further rules are the operator's."""
    role = "nox_firewall"
    if status != 0:
        return  # without iptables the package's finding says it
    if not re.search(r'(?m)^\s*ENABLED="?yes', boot):
        yield Finding("firewall.boot", role, "/etc/ufw/ufw.conf", "ENABLED=yes", "not enabled")
    if "-P INPUT DROP" not in rules or "-A INPUT -j ufw-before-input" not in rules:
        yield Finding("firewall.open", role, "INPUT", "closed but for our ports", "open")
        return
    user = [line for line in rules.splitlines() if line.startswith("-A ufw-user-input ")]
    if "-A ufw-before-input -j ufw-user-input" not in rules:
        user = []
    for port in ports:
        pattern = re.compile(rf"--dports? (?:\S+,)?{port}(?:,\S+)?\b.*-j (?:ACCEPT|ufw-user-limit)")
        if not any(pattern.search(line) for line in user):
            yield Finding("firewall.rule", role, f"{port}/tcp", "open", "closed")


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# ── Proxy


def caddy_loaded() -> Any:
    """Caddy's running configuration. Without a Host header: the socket's allowed origin is the empty one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(3)
        connection.connect(CADDY_ADMIN)
        connection.sendall(b"GET /config/ HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    return json.loads(answer.partition(b"\r\n\r\n")[2])


def proxy_test(proxy: str) -> tuple[str, Any]:
    """(what the proxy says against its configuration on disk, that configuration in JSON where it has such a form)."""
    if proxy == "nginx":
        ran = run("nginx", "-t", "-q")
        return (ran.stderr.strip().splitlines() or ["not readable"])[0] if ran.returncode not in (0, 127) else "", None
    ran = run("caddy", "adapt", "--adapter", "caddyfile", "--config", CADDYFILE)
    if ran.returncode != 0:
        return (ran.stderr.strip().splitlines() or ["not readable"])[-1] if ran.returncode != 127 else "", None
    return "", json.loads(ran.stdout)


def blamed(message: str, ours: list[str]) -> str:
    """The file that a proxy's complaint names, "" if it names one of ours or none."""
    for path in re.findall(r"(/etc/(?:caddy|nginx)/[^\s:,'\"]+)", message):
        if path not in ours and path not in (CADDYFILE, "/etc/nginx/nginx.conf"):
            return str(path)
    return ""


def compare_proxy(proxy: str, unit: dict[str, str], ours: list[str], intact: bool) -> Findings:
    role, active = "nox_proxy", unit.get("ActiveState") == "active"
    message, wanted = proxy_test(proxy)
    if message:
        other = blamed(message, ours)
        if other:
            yield Finding("proxy.others", OPERATOR, other, "readable by the proxy", message[-200:])
        elif intact:
            yield Finding("proxy.config", role, proxy, "readable by the proxy", message[-200:])
        return
    if not active:
        return
    stale = False
    if proxy == "caddy":
        try:
            stale = caddy_loaded() != wanted
        except (OSError, ValueError):
            # The operator's own Caddyfile may have its admin endpoint elsewhere, or none.
            stale = caddyfile_is_ours()
    else:
        since = max((started(pid) for pid in children(unit.get("MainPID", "0"))), default=0.0)
        changes = [modified(str(path)) for path in Path("/etc/nginx").rglob("*")]
        stale = bool(since) and any(since + CLOCK_SLACK < change <= time.time() for change in changes)
    if stale and intact:
        yield Finding("proxy.stale", role, f"{proxy}.service", "the configuration on disk", "another one is loaded")


def children(pid: str) -> list[str]:
    return read_text(f"/proc/{pid}/task/{pid}/children").split()


def compare_certificate(name: str, authority: str, active: bool) -> Findings:
    """What clients get on port 443, verified as they would."""
    if not active:
        return
    try:
        context = ssl.create_default_context(cafile=authority or None)
        context.check_hostname = False  # asked on loopback; which name is on it was the smoke tests' question
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        with (
            socket.create_connection(("127.0.0.1", 443), 3) as plain,
            context.wrap_socket(plain, server_hostname=name) as connection,
        ):
            shown = connection.getpeercert() or {}
    except ssl.SSLError as error:
        yield Finding("certificate.bad", "nox_proxy", name, "verifiable", str(error)[:120])
        return
    except OSError:
        return  # a closed port has its own finding
    start, end = (ssl.cert_time_to_seconds(str(shown[key])) for key in ("notBefore", "notAfter"))
    left = end - time.time()
    if left < (end - start) / 10:
        yield Finding(
            "certificate.ends", "nox_proxy", name, "a tenth of its life left", f"{left / 86400:.1f} days", WARN
        )


# ── Disk


def compare_disk(paths: list[str]) -> Findings:
    seen = set()
    for path in paths:
        probe = Path(path)
        while not probe.exists():
            probe = probe.parent
        device = probe.stat().st_dev
        if device in seen:
            continue
        seen.add(device)
        disk = os.statvfs(probe)
        if disk.f_blocks and disk.f_bavail < disk.f_blocks * LEAST_FREE:
            free = f"{disk.f_bavail * disk.f_frsize >> 20} MiB"
            yield Finding("disk.space", OPERATOR, path, f"{LEAST_FREE:.0%} free", free)
        if disk.f_files and disk.f_favail < disk.f_files * LEAST_FREE:
            yield Finding("disk.inodes", OPERATOR, path, f"{LEAST_FREE:.0%} free", str(disk.f_favail))


def compare_logs() -> Findings:
    try:
        size = sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(LOG_DIR))
    except OSError:
        return  # the paths say so
    if size > LOGS_LARGE:
        yield Finding("logs.large", OPERATOR, str(LOG_DIR), f"below {LOGS_LARGE >> 20} MiB", f"{size >> 20} MiB", WARN)


# ── The whole


def sandbox_path(record: Record) -> str:
    """Where the settings say; what they said at the record when they can't be read."""
    settings = parse_settings(read_text(str(CONFIG)))
    return settings.get("NOX_SANDBOX") or str(record.get("sandbox", "/home/nox/nox/sandbox"))


def read_record(path: Path) -> Record:
    """The record as it was written; empty where there is none, or one that was cut, or changed by other hands."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        written = record.pop("digest", "")
        whole = record["version"] == VERSION and written == digest_of_record(record)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return record if whole else {}


def digest_of_record(record: Record) -> str:
    return digest_of(json.dumps(record, sort_keys=True).encode())


def make_record(about: dict[str, Any]) -> Record:
    """The host as it is now."""
    proxy, firewall = about.get("proxy", "none"), bool(about.get("firewall"))
    sandbox = sandbox_path({})
    paths = {}
    for path, (role, content) in managed_paths(about, sandbox).items():
        found = describe(path, content)
        if found:
            paths[path] = {"role": role, **found}
    packages = dict(PACKAGES)
    units = dict.fromkeys(NOX_UNITS, "nox_service")
    if firewall:
        packages.update({"ufw": "nox_firewall", "iptables": "nox_firewall"})
        units["ufw.service"] = "nox_firewall"
    if proxy != "none":
        packages[proxy] = "nox_proxy"
        units[f"{proxy}.service"] = "nox_proxy"
    for path, (needed, run_by) in HARDENED.items():
        if path in paths:
            packages.update(dict.fromkeys(needed, "nox_harden"))
            units.update(dict.fromkeys(run_by, "nox_harden"))
    try:
        release = Path(os.readlink(ROOT / "current")).name
    except OSError:
        release = ""
    return {
        "version": VERSION,
        "about": about,
        "sandbox": sandbox,
        # by key, without anything that smells of a secret: what a lost settings file is made again from
        "settings": {
            name: value
            for name, value in parse_settings(read_text(str(CONFIG))).items()
            if not re.search("TOKEN|SECRET|KEY|PASSWORD", name)
        },
        "release": release,
        # the history of releases: what a lost manifest is made again from
        "manifest": read_manifest(MANIFEST),
        "paths": paths,
        "accounts": {name: found for name in ACCOUNTS if (found := account(name))},
        "packages": packages,
        "units": units,
        "hardening": {
            "kernel": kernel_settings.wanted(),
            "mounts": tied_down(),
            "lines": {path: entry["line"] for path, entry in host_files.recorded().items() if "line" in entry},
        },
    }


def renewed(old: Record, new: Record, role: str) -> Record:
    """The old record with one role's part of the new one: the rest of the host isn't looked at, and may have drifted."""

    def part(entry: Any) -> bool:
        return bool((entry["role"] if isinstance(entry, dict) else entry) == role)

    merged = {**old, "hardening": new["hardening"]}
    for kind in ("paths", "packages", "units"):
        merged[kind] = {name: entry for name, entry in old[kind].items() if not part(entry)}
        merged[kind].update({name: entry for name, entry in new[kind].items() if part(entry)})
    return merged


def examine(record: Record) -> list[Finding]:
    """Everything, against the record."""
    about = record["about"]
    proxy = about.get("proxy", "none")
    findings = list(compare_accounts(record["accounts"]))
    sandbox = sandbox_path(record)
    for path, wanted in record["paths"].items():
        # a sandbox that the operator has moved: the new place, the old demands
        findings += compare_path(sandbox if path == record["sandbox"] else path, wanted)
    findings += compare_packages(record["packages"])
    findings += compare_settings(about.get("patterns", {}))
    findings += compare_release(record["release"])
    units = show_units(list(record["units"]))
    findings += compare_units(record["units"], units, {finding.what for finding in findings})
    findings += compare_sockets(units, proxy)
    if about.get("firewall"):
        ran = run("iptables", "-S")
        findings += compare_firewall(about["firewall"], ran.stdout, read_text("/etc/ufw/ufw.conf"), ran.returncode)
    if proxy != "none":
        unit = units.get(f"{proxy}.service", {})
        ours = [path for path, entry in record["paths"].items() if entry["role"] == "nox_proxy"]
        intact = not any(finding.what in ours for finding in findings)
        findings += compare_proxy(proxy, unit, ours, intact)
        name = re.sub(r"^https?://|[\[\]]", "", about.get("url", ""))
        # what another configuration answers with says nothing about ours
        asked = unit.get("ActiveState") == "active" and not any(one.id == "proxy.stale" for one in findings)
        findings += compare_certificate(name, about.get("ca", ""), asked)
    findings += compare_hardening(record.get("hardening", {}))
    findings += compare_disk(["/", str(ROOT), "/var/log", str(LOG_DIR), sandbox])
    findings += compare_logs()
    findings.sort(key=lambda one: ROLES.index(one.owner) if one.owner in ROLES else len(ROLES))
    return [one._replace(since=since(one, units)) for one in findings]


def examine_living() -> list[Finding]:
    """What can be said without a record: whether the parts that are there run what is on disk."""
    units = show_units([*NOX_UNITS, "caddy.service", "nginx.service"])
    ours = dict.fromkeys(NOX_UNITS, "nox_service")
    findings = list(compare_units(ours, units, set()))
    for proxy in ("caddy", "nginx"):
        if os.path.lexists(list(PROXY_PATHS[proxy])[-1]):
            findings += compare_sockets(units, proxy)
            findings += compare_proxy(proxy, units.get(f"{proxy}.service", {}), list(PROXY_PATHS[proxy]), True)
            break
    else:
        findings += compare_sockets(units, "none")
    return [one._replace(since=since(one, units)) for one in findings]


def since(one: Finding, units: dict[str, dict[str, str]]) -> str:
    """When it happened, as far as the host remembers: what is gone was removed at its directory's last change, or before."""
    moment = 0.0
    if one.id in ("unit.failed", "unit.inactive", "unit.masked") and one.what in units:
        microseconds = int(units[one.what].get("InactiveEnterTimestampMonotonic") or 0)
        if microseconds:
            moment = time.time() - time.clock_gettime(time.CLOCK_MONOTONIC) + microseconds / 1e6
    elif one.id == "package.missing":
        removed = re.findall(rf"(?m)^(\S+ \S+) remove {re.escape(one.what)}:", read_text("/var/log/dpkg.log"))
        moment = time.mktime(time.strptime(removed[-1], "%Y-%m-%d %H:%M:%S")) if removed else 0.0
    elif one.id == "path.owner" and any(part.isdigit() for part in one.found.split(":")):
        pass  # the account went, not the file
    elif one.id == "mount.options":
        pass  # nothing tells
    elif one.what.startswith("/") and one.owner != OPERATOR:
        path = Path(one.what.partition(":")[0])
        try:
            moment = path.lstat().st_ctime
        except OSError:
            parent = next(place for place in path.parents if place.is_dir())
            moment = parent.stat().st_mtime
    return text_of(moment) if moment else ""


def text_of(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def traces() -> list[str]:
    """What of Nox is on this host, whether or not an install came to its end."""
    places = [str(CONFIG), str(ROOT), *(f"{UNIT_DIR}/{unit}" for unit in NOX_UNITS)]
    return [path for path in places if os.path.lexists(path)]


def look(path: Path) -> tuple[str, list[Finding], Record]:
    """(verdict, findings, record)."""
    record = read_record(path)
    if record:
        findings = examine(record)
        status = describe(str(path), False)
        if (status["owner"], status["mode"]) != ("root:root", "0600"):
            shown = f"{status['owner']} {status['mode']}"
            findings.append(Finding("record.mode", "nox_service", str(path), "root:root 0600", shown))
        written = modified(str(path))
        if time.time() < written - CLOCK_BEHIND:
            findings.append(
                Finding("clock.behind", OPERATOR, "clock", f"after {text_of(written)}", text_of(time.time()), WARN)
            )
        return ("drifted" if findings else "clean"), findings, record
    if not traces():
        return "absent", [], {}
    why = "not as it was written" if path.exists() else "nothing"
    missing = Finding("record.missing", "all", str(path), "a record of a finished install", why)
    return "drifted", [missing._replace(since=since(missing, {})), *examine_living()], {}


def answer(options: dict[str, Any]) -> dict[str, Any]:
    """What nox_state returns; `options` are its own, checked, and check_mode."""
    path, state, dry = Path(options["record"]), options["state"], options["check_mode"]
    extra: dict[str, Any] = {
        "changed": False,
        "host": {
            "python": f"{sys.version_info.major}.{sys.version_info.minor}",
            "arch": os.uname().machine,
            "free_mib": {place: host_files.free_mib(place) for place in options["paths"]},
        },
    }
    if state == "recorded":
        old = read_record(path)
        new = make_record({**old.get("about", {}), **options["about"]})
        if options["role"]:  # without a record there is none to renew: an install writes it
            new = renewed(old, new, options["role"]) if old else old
        extra["changed"] = new != old
        if not dry and new:
            extra["changed"] = write_record(path, new)
    begun = time.monotonic()
    verdict, findings, record = look(path)
    if state == "cleared":
        extra["changed"] = in_the_way(findings, record)
        extra["aside"] = [] if dry else clear(findings, record, Path(options["aside"]))
    extra["seconds"] = round(time.monotonic() - begun, 3)
    return {**answer_of(verdict, findings, record), **extra}


def answer_of(verdict: str, findings: list[Finding], record: Record) -> dict[str, Any]:
    """What nox_state returns of look()."""
    return {
        "verdict": verdict,
        "findings": [finding._asdict() for finding in findings],
        "owners": owners_of(findings),
        "down": down_units(findings),
        "set_right": right_paths(findings),
        # together: the socket's file descriptor and the front's connection belong to each other
        "stale": list(NOX_UNITS) if stale_units(findings, "nox_service") else [],
        "stale_proxy": stale_units(findings, "nox_proxy"),
        "in_the_way": in_the_way(findings, record),
        "release": releases.kept(ROOT, record) if "nox_release" in owners_of(findings) else {},
        "about": {key: value for key, value in record.get("about", {}).items() if key != "patterns"},
        "ids": {
            name: {key: entry[key] for key in ("uid", "gid")} for name, entry in record.get("accounts", {}).items()
        },
    }


def light(findings: list[Finding], role: str) -> bool:
    """Whether units to start, attributes to set, and the record to write again are all that a role's findings ask for."""
    right = set(right_paths(findings))
    return all(one.id in (*ONLY_DOWN, "record.mode") or one.what in right for one in findings if one.owner == role)


def right_paths(findings: list[Finding]) -> list[str]:
    """Paths of which only owner or mode differ. Of a lost account's the account is lost, and the role makes both."""
    if any(one.id.startswith("user.") or one.id == "record.missing" for one in findings):
        return []
    deeper = {one.what for one in findings if one.id not in ATTRIBUTES}
    return sorted({one.what for one in findings if one.id in ATTRIBUTES} - deeper)


def owners_of(findings: list[Finding]) -> list[str]:
    """The roles to run, in the order of an install; without a record nothing can be left out."""
    wanted = {finding.owner for finding in findings}
    every = [role for role in ROLES if role != "nox_harden" or hardened()] if "all" in wanted else []
    return [role for role in ROLES if role in every or (role in wanted and not light(findings, role))]


def down_units(findings: list[Finding]) -> list[str]:
    """Units to start, in the order of an install, of roles that need not run for anything else."""
    left_out = set(ROLES) - set(owners_of(findings))
    ids = ("unit.failed", "unit.inactive", "unit.disabled", "unit.masked", "unit.reload")  # the others are up
    units = [one.what for one in findings if one.id in ids and one.owner in left_out]
    return sorted(set(units), key=lambda name: NOX_UNITS.index(name) if name in NOX_UNITS else len(NOX_UNITS))


def stale_units(findings: list[Finding], role: str) -> list[str]:
    """Units of one role that are up, and have to start anew all the same. Roles only start what is down."""
    ids = ("unit.stale", "unit.reload", "socket.closed", "proxy.stale")
    return sorted({one.what for one in findings if one.owner == role and one.id in ids})


def obstacles(findings: list[Finding], record: Record) -> list[str]:
    """Directories where a file is to be written stop the roles; with a record they are findings."""
    if record or not findings:
        return []
    return [
        path for path, (_, content) in PATHS.items() if content and Path(path).is_dir() and not Path(path).is_symlink()
    ]


def in_the_way(findings: list[Finding], record: Record) -> bool:
    ids = ("path.kind", "path.changed", "path.immutable", "release.damaged", "release.manifest", "disk.space")
    return any(one.id in ids for one in findings) or bool(right_paths(findings)) or bool(obstacles(findings, record))


def make_room() -> None:
    """Frees what anybody can have again: packages that apt has fetched, and releases that were never finished."""
    run("apt-get", "clean")
    for leftover in ROOT.glob("releases/.*"):
        shutil.rmtree(leftover, ignore_errors=True)


def set_right(path: str, record: Record) -> None:
    """Owner and mode as recorded, of what was opened: a user of the service may put a link in the place meanwhile."""
    entry = record["paths"].get(path) or record["paths"][record["sandbox"]]  # a sandbox that was moved
    user, _, group = entry["owner"].partition(":")
    ids = pwd.getpwnam(user).pw_uid, grp.getgrnam(group).gr_gid
    if entry["kind"] == "link":
        os.chown(path, *ids, follow_symlinks=False)
        return
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        os.fchown(handle, *ids)
        os.fchmod(handle, int(entry["mode"], 8))
    finally:
        os.close(handle)


def clear(findings: list[Finding], record: Record, aside: Path) -> list[dict[str, str]]:
    """Moves or copies aside what the roles would overwrite or stumble over. Nothing that was anybody's is deleted."""
    if any(one.id == "disk.space" for one in findings):
        make_room()
    place = aside / time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    moved = []

    def keep(path: str, copy: bool) -> None:
        target = Path(f"{place}{path}")
        aside.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        aside.mkdir(mode=0o700, exist_ok=True)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if copy:
            shutil.copy2(path, target, follow_symlinks=False)
        else:
            shutil.move(path, target)
        moved.append({"what": path, "to": str(target)})

    for finding in findings:
        if finding.id == "path.immutable":
            with open(finding.what, "rb") as handle:  # noqa: PTH123
                flags = array.array("L", [0])
                fcntl.ioctl(handle, GETFLAGS, flags)
                flags[0] &= ~IMMUTABLE
                fcntl.ioctl(handle, SETFLAGS, flags)
    for path in right_paths(findings):
        set_right(path, record)
    for finding in findings:
        if finding.id == "path.kind":
            keep(finding.what, copy=False)
        elif finding.id in ("path.changed", "release.manifest"):
            keep(finding.what, copy=True)
        elif finding.id == "release.damaged":
            for changed in changed_files(ROOT / "releases" / finding.what):
                keep(str(changed), copy=True)
    for path in obstacles(findings, record):
        keep(path, copy=False)
    return moved


def write_record(path: Path, record: Record) -> bool:
    """Through a private temporary file and a rename; False when it says the same already."""
    text = json.dumps({**record, "digest": digest_of_record(record)}, indent=1, sort_keys=True) + "\n"
    status = describe(str(path), False)
    private = (status.get("owner"), status.get("mode")) == ("root:root", "0600")
    if read_text(str(path)) == text and private and modified(str(path)) <= time.time():
        return False
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(descriptor)
    temporary.replace(path)
    return True
