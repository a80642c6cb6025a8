"""What can happen to a host: how to do it, and exactly what drift must say.

A finding is written "id what". `{release}` stands for the current release's name, `{record}` for the record's path.
"""

from __future__ import annotations

from typing import NamedTuple

CADDY = "/etc/caddy/sites-enabled/nox-api.caddy"
UNITS = "/etc/systemd/system"
CONFIG = "/etc/default/nox-api"
# As anybody does who may talk to Caddy's admin socket.
OTHER_CONFIGURATION = (
    "python3 -c \"import socket; s = socket.socket(socket.AF_UNIX); s.connect('/var/lib/caddy/admin.sock'); "
    "s.sendall(b'DELETE /config/apps/http/servers/srv0/routes/0 HTTP/1.0\\r\\n\\r\\n'); print(s.recv(999))\""
)
# Each path on record is anybody's: only the roles still know whose it was.
THROW_OPEN = """
import json, os
for path, entry in json.load(open("/var/lib/nox/state.json"))["paths"].items():
    if entry["kind"] != "link":
        os.chown(path, 65534, 65534)
        os.chmod(path, 0o777)
"""


class Damage(NamedTuple):
    """`keeps_log`: the damage itself leaves the logs alone, so repair must, too."""

    name: str
    command: str
    findings: tuple[str, ...]
    keeps_log: bool = True


def drop_user(name: str) -> str:
    """As a botched edit of the account files does: processes of the user go on."""
    files = "/etc/passwd /etc/shadow /etc/group /etc/gshadow"
    return f"sed -i '/^{name}:/d' {files}"


DAMAGES = [
    # ── units
    Damage("front stopped", "systemctl stop nox-api", ("unit.inactive nox-api.service",)),
    Damage(
        "front failed, start limit hit",
        "chmod 000 /opt/nox/releases; systemctl restart nox-api; for i in $(seq 12); do systemctl start nox-api; done; "
        "chmod 755 /opt/nox/releases; systemctl is-failed nox-api",
        ("unit.failed nox-api.service",),
    ),
    Damage(
        "front masked",
        f"systemctl stop nox-api; ln -sf /dev/null {UNITS}/nox-api.service; systemctl daemon-reload",
        (f"path.kind {UNITS}/nox-api.service", "unit.masked nox-api.service"),
    ),
    Damage("front disabled", "systemctl disable nox-api", ("unit.disabled nox-api.service",)),
    Damage(
        "runner's socket stopped",
        "systemctl stop nox-runner.socket nox-runner.service nox-api",
        (
            "unit.inactive nox-api.service",
            "unit.inactive nox-runner.service",
            "unit.inactive nox-runner.socket",
        ),
    ),
    Damage("runner's socket file deleted", "rm /run/nox-runner.sock", ("socket.closed nox-runner.socket",)),
    Damage(
        "unit edited, not reloaded",
        f"sed -i 's/^NoNewPrivileges=.*/NoNewPrivileges=no/' {UNITS}/nox-runner.service",
        (f"path.changed {UNITS}/nox-runner.service", "unit.reload nox-runner.service"),
    ),
    Damage(
        "unit file deleted",
        f"rm {UNITS}/nox-runner.service; systemctl daemon-reload",
        (f"path.missing {UNITS}/nox-runner.service", "unit.missing nox-runner.service"),
    ),
    Damage(
        "directory where a unit file was",
        f"rm {UNITS}/nox-runner.socket; mkdir {UNITS}/nox-runner.socket",
        (f"path.kind {UNITS}/nox-runner.socket", "unit.reload nox-runner.socket"),
    ),
    # ── settings
    Damage("settings unreadable", f"echo 'this is no setting' >> {CONFIG}", (f"settings.line {CONFIG}:{{line}}",)),
    Damage(
        "setting out of range",
        f"sed -i 's/^NOX_PORT=.*/NOX_PORT=eighty/' {CONFIG}",
        (f"settings.value {CONFIG}:NOX_PORT",),
    ),
    Damage("settings readable by all", f"chmod 644 {CONFIG}", (f"path.mode {CONFIG}",)),
    Damage("settings deleted", f"rm {CONFIG}", (f"path.missing {CONFIG}",)),
    # ── accounts, home, sandbox
    Damage(
        "runner's account deleted",
        drop_user("nox"),
        (
            "user.missing nox",
            "path.owner /home/nox",
            "path.owner /home/nox/nox",
            "path.owner /home/nox/nox/sandbox",
        ),
    ),
    Damage(
        "front's account deleted",
        drop_user("nox-api"),
        (
            "user.missing nox-api",
            "path.owner /var/log/nox-api",
            "path.owner /var/lib/nox-api",
            *(f"path.owner /var/lib/nox-api/history{path}" for path in ("", "/HEAD", "/config", "/objects", "/refs")),
            "socket.closed nox-runner.socket",
        ),
    ),
    Damage("runner got a shell", "usermod -s /bin/bash nox", ("user.shell nox",)),
    Damage("sandbox is root's", "chown root:root /home/nox/nox/sandbox", ("path.owner /home/nox/nox/sandbox",)),
    Damage(
        "sandbox moved away",
        "mv /home/nox/nox/sandbox /root/sandbox-before",
        ("path.missing /home/nox/nox/sandbox",),
    ),
    Damage(
        "file where the sandbox was",
        "mv /home/nox/nox/sandbox /root/sandbox-before; echo mine > /home/nox/nox/sandbox",
        ("path.kind /home/nox/nox/sandbox",),
    ),
    Damage("home closed to the runner", "chmod 700 /home/nox", ("path.mode /home/nox",)),
    # ── release
    Damage(
        "venv deleted",
        "rm -r /opt/nox/releases/{release}/venv",
        ("release.damaged {release}",),
    ),
    Damage(
        "one module replaced",
        "echo 'raise SystemExit' > $(find /opt/nox/releases/{release}/ -path '*nox_api/__main__.py')",
        ("release.damaged {release}",),
    ),
    Damage(
        "release's list cut",
        "truncate -s 99 /opt/nox/releases/{release}/RELEASE.json",
        ("release.damaged {release}",),
    ),
    Damage(
        "compiled code cut short",
        "truncate -s 99 $(find /opt/nox/releases/{release}/ -path '*nox_api/__pycache__/__main__.*')",
        ("release.damaged {release}",),
    ),
    Damage(
        "somebody else's module in the release",
        "touch /opt/nox/releases/{release}/venv/lib/$(ls /opt/nox/releases/{release}/venv/lib)/site-packages/sitecustomize.py",
        ("release.damaged {release}",),
    ),
    Damage("current points nowhere", "ln -sfn releases/gone /opt/nox/current", ("path.changed /opt/nox/current",)),
    Damage("release deleted", "rm -r /opt/nox/releases/*", ("release.missing {release}",)),
    Damage(
        "half-done release",
        "mkdir -p /opt/nox/releases/.9.9.9-0123456789ab.partial-x/venv",
        ("release.leftover /opt/nox/releases/.9.9.9-0123456789ab.partial-x",),
    ),
    Damage(
        "release owned by its user",
        "chown -R nox /opt/nox/releases/{release}/venv/lib",
        ("release.writable {release}",),
    ),
    Damage(
        "archive deleted",
        "rm /opt/nox/archives/*",
        ("release.archive /opt/nox/archives/{release}.tar.gz",),
    ),
    Damage("manifest garbled", "echo '{{' > /opt/nox/manifest.json", ("release.manifest /opt/nox/manifest.json",)),
    Damage(
        "everything below /opt/nox deleted",
        "rm -r /opt/nox",
        (
            "path.missing /opt/nox",
            "path.missing /opt/nox/archives",
            "path.missing /opt/nox/releases",
            "path.missing /opt/nox/current",
            "path.missing /opt/nox/.venv",
            "path.missing /opt/nox/manifest.json",
            "release.missing {release}",
        ),
    ),
    # ── logs
    Damage("log directory deleted", "rm -r /var/log/nox-api", ("path.missing /var/log/nox-api",), keeps_log=False),
    Damage("log directory is root's", "chown root:root /var/log/nox-api", ("path.owner /var/log/nox-api",)),
    Damage("rotation removed", "rm /etc/logrotate.d/nox-api", ("path.missing /etc/logrotate.d/nox-api",)),
    # ── firewall
    Damage("firewall disabled", "ufw disable", ("firewall.boot /etc/ufw/ufw.conf", "firewall.open INPUT")),
    Damage(
        "firewall stopped",
        "systemctl stop ufw",
        ("unit.inactive ufw.service", "firewall.open INPUT"),
    ),
    Damage("firewall reset", "ufw --force reset", ("firewall.boot /etc/ufw/ufw.conf", "firewall.open INPUT")),
    Damage("rules flushed behind UFW's back", "iptables -P INPUT ACCEPT; iptables -F", ("firewall.open INPUT",)),
    Damage("https rule deleted", "ufw delete allow 443/tcp", ("firewall.rule 443/tcp",)),
    # ── proxy
    Damage("proxy stopped and masked", "systemctl mask --now caddy", ("unit.masked caddy.service",)),
    Damage("site garbled", f"echo 'nonsense {{{{' >> {CADDY}", (f"path.changed {CADDY}",)),
    Damage(
        "site deleted, proxy reloaded",
        f"rm {CADDY}; systemctl reload caddy",
        (
            f"path.missing {CADDY}",
            "socket.closed caddy.service",
        ),
    ),
    Damage(
        "another configuration loaded",
        OTHER_CONFIGURATION,
        ("proxy.stale caddy.service",),
    ),
    Damage(
        "proxy failed, start limit hit",
        "chmod 000 /usr/bin/caddy; systemctl restart caddy; for i in $(seq 12); do systemctl start caddy; done; "
        "chmod 755 /usr/bin/caddy; systemctl is-failed caddy",
        ("unit.failed caddy.service",),
    ),
    # ── tools
    Damage("tool deleted", "rm /usr/local/bin/nox-debug", ("path.missing /usr/local/bin/nox-debug",)),
    Damage(
        "tool replaced and made immutable",
        "echo '#!/bin/sh' > /usr/local/bin/nox-monitor; chattr +i /usr/local/bin/nox-monitor",
        ("path.changed /usr/local/bin/nox-monitor", "path.immutable /usr/local/bin/nox-monitor"),
    ),
    Damage(
        "package removed",
        "dpkg --remove --force-depends bubblewrap",
        ("package.missing bubblewrap",),
    ),
    Damage("record readable by all", "chmod 644 {record}", ("record.mode {record}",)),
    Damage("record deleted", "rm {record}", ("record.missing {record}",)),
    Damage("record edited", """sed -i 's/"role": /"rule": /' {record}""", ("record.missing {record}",)),
    Damage(
        "record deleted, another configuration loaded",
        f"rm {{record}}; {OTHER_CONFIGURATION}",
        ("record.missing {record}", "proxy.stale caddy.service"),
    ),
    Damage(
        "record deleted, everything thrown open",
        f"""python3 -c '{THROW_OPEN}' && rm {{record}}""",
        ("record.missing {record}",),
    ),
    # ── all kinds of times and states in between
    Damage(
        "install that ended half-way",
        f"systemctl stop nox-api nox-runner.service nox-runner.socket; rm {{record}} {UNITS}/nox-* /opt/nox/current; "
        "systemctl daemon-reload",
        (
            "record.missing {record}",
            "unit.missing nox-runner.socket",
            "unit.missing nox-runner.service",
            "unit.missing nox-api.service",
        ),
    ),
    Damage(
        "upgrade that ended half-way",
        "cp -a /opt/nox/releases/{release} /opt/nox/releases/0.0.1-0123456789ab; "
        "ln -sfn releases/0.0.1-0123456789ab /opt/nox/current; systemctl restart nox-runner nox-api",
        ("path.changed /opt/nox/current",),
    ),
    Damage(
        "release switched, services not restarted",
        "sleep 2.5; ln -sfn releases/{release} /opt/nox/current",
        ("unit.stale nox-api.service", "unit.stale nox-runner.service"),
    ),
    Damage(
        "clock set back an hour",
        f"touch -d '+1 hour' {{record}} {CADDY} {CONFIG}; touch -h -d '+1 hour' /opt/nox/current",
        ("clock.behind clock",),
    ),
    Damage("python3 deleted", "rm /usr/bin/python3", ("host.python /usr/bin/python3",)),
    Damage(
        "modes thrown open",
        "chmod 777 /opt/nox /home/nox/nox /var/log/nox-api /usr/local/bin/nox-debug",
        (
            "path.mode /opt/nox",
            "path.mode /home/nox/nox",
            "path.mode /var/log/nox-api",
            "path.mode /usr/local/bin/nox-debug",
        ),
    ),
]
