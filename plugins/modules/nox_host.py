#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Reads, in one round trip, all that Nox's roles want to know of a host before they change it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nox_host
short_description: What Nox needs to know of a host, read in one round trip
description:
  - Reads the distribution, the Python, systemd, disk space, listening sockets, the ssh ports really in use
    and the state of the settings file. Changes nothing; the token is judged here and never returned.
author: The Nox maintainers
options:
  settings_path:
    description: The service's settings file.
    type: path
    default: /etc/default/nox-api
  paths:
    description: Paths whose file systems' free space is wanted; missing ones are asked of their nearest parent.
    type: list
    elements: path
    default: []
"""

EXAMPLES = r"""
- name: Look at the host
  nox.platform.nox_host:
    paths: [/opt, /var/log]
  register: nox_preflight__host
"""

RETURN = r"""
host:
  description:
    - What was read. Sizes are in MiB, ports are TCP. C(proxies) have a configuration here. C(lacks) says why the kernel gives this host no audit rules, or no say in
      which modules are loaded; empty where it does.
  returned: always
  type: dict
  sample:
    id: debian
    release: debian-12
    codename: bookworm
    arch: x86_64
    python: "3.11"
    systemd: 252
    cores: 2
    hostname: nox1
    fqdn: nox1.example.org
    addresses: [10.77.0.11]
    lacks: {audit: "", modules: the kernel is shared with other hosts}
    mounts: {/dev/shm: [nodev, nosuid, rw]}
    free_mib: {/opt: 20480}
    ssh_ports: [22]
    listeners: [{port: 22, address: 0.0.0.0, process: sshd, unit: ssh.service}]
    proxies: [caddy, nginx]
    sites: {caddy: [], nginx: [blog]}
    settings: {NOX_PORT: "8080"}
    token: absent
"""

import hashlib
import os
import pwd
import re
import shutil
import socket
import struct
import sys
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nox.platform.plugins.module_utils.host_files import free_mib, mounts
from ansible_collections.nox.platform.plugins.module_utils.settings_file import (
    parse_settings,
    token_state,
)

NETLINK_AUDIT = 9  # include/uapi/linux/netlink.h
AUDIT_GET = 1000  # include/uapi/linux/audit.h
NLM_F_REQUEST, NLM_F_ACK = 1, 4
NLMSG_ERROR = 2
CAP_SYS_MODULE = 16  # include/uapi/linux/capability.h
SHARED = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108  where everybody writes
LISTEN = "0A"  # TCP_LISTEN in the `st` column of /proc/net/tcp, see include/net/tcp_states.h


def os_release() -> dict[str, str]:
    """The key=value pairs of /etc/os-release, unquoted."""
    found: dict[str, str] = {}
    for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines():
        key, sep, value = line.partition("=")
        if sep:
            found[key.strip()] = value.strip().strip('"')
    return found


def systemd_version(module: AnsibleModule) -> int:
    """The major version, 0 where systemd isn't there."""
    if not shutil.which("systemctl"):
        return 0
    _, out, _ = module.run_command(["systemctl", "--version"])
    match = re.match(r"systemd (\d+)", out)
    return int(match.group(1)) if match else 0


def _address(hex_address: str) -> tuple[str, int]:
    """Turns the kernel's host-order hex `0100007F:1F90` into ("127.0.0.1", 8080)."""
    raw, port = hex_address.split(":")
    words = [int(raw[i : i + 8], 16) for i in range(0, len(raw), 8)]
    packed = b"".join(struct.pack("=I", word) for word in words)
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    return socket.inet_ntop(family, packed), int(port, 16)


def socket_owners() -> dict[str, int]:
    """Socket inode → one pid that holds it. Needs root to see other users' processes."""
    owners: dict[str, int] = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            for descriptor in os.scandir(f"/proc/{entry.name}/fd"):
                target = os.readlink(descriptor.path)
                if target.startswith("socket:["):
                    # the lowest pid wins: the parent of a forking server, not one of its children; but systemd,
                    # which keeps a copy of its services' sockets, only where nobody else holds it
                    inode, pid = target[8:-1], int(entry.name)
                    owners[inode] = min(pid, owners.get(inode, pid), key=lambda one: (one == 1, one))
        except OSError:  # the process ended, or isn't ours to see
            continue
    return owners


def process_unit(pid: int) -> str:
    """The systemd unit a process belongs to, "" where it can't be told."""
    try:
        text = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8")
    except OSError:
        return ""
    units = re.findall(r"/([^/\n]+\.(?:service|socket|scope))", text)
    return units[-1] if units else ""


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def process_name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def listeners() -> list[dict[str, Any]]:
    """Every listening TCP socket with the process and the unit that hold it."""
    owners = socket_owners()
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            column = line.split()
            if column[3] != LISTEN:
                continue
            address, port = _address(column[1])
            pid = owners.get(column[9], 0)
            unit = process_unit(pid) if pid else ""
            if pid == 1 and user_name(int(column[7])) == "nox-api":
                unit = "nox-api.service"  # kept by systemd for a service that is just being restarted
            found.append(
                {
                    "port": port,
                    "address": address,
                    "process": process_name(pid) if pid else "",
                    "unit": unit,
                }
            )
    return sorted(found, key=lambda one: (one["port"], one["address"]))


def session_ssh_port() -> int | None:
    """The server port of the ssh session this module runs in, None where it isn't one.

    sudo strips SSH_CONNECTION, so the ancestors' environments are asked too.
    """
    pid = os.getpid()
    while pid > 1:
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        except OSError:
            return None
        for pair in environ:
            if pair.startswith(b"SSH_CONNECTION="):
                return int(pair.rsplit(b" ", 1)[1])
        match = re.search(r"^PPid:\s+(\d+)", status, re.MULTILINE)
        pid = int(match.group(1)) if match else 0
    return None


def ssh_ports(listening: list[dict[str, Any]]) -> list[int]:
    """Ports on which ssh is really served: what listens, and what this session came through.

    Loopback-only listeners are forwardings of somebody's session, not the server.
    """
    ports = {
        one["port"]
        for one in listening
        if (one["process"] == "sshd" or one["unit"] in ("ssh.socket", "ssh.service", "sshd.service"))
        and one["address"] not in ("127.0.0.1", "::1")
    }
    session = session_ssh_port()
    if session:
        ports.add(session)
    return sorted(ports)


def pristine(module: AnsibleModule, path: str) -> bool:
    """Whether a file is as its package shipped it (dpkg's own record of conffiles)."""
    rc, owner, _ = module.run_command(["dpkg-query", "--search", path])
    if rc != 0:
        return False
    _, out, _ = module.run_command(["dpkg-query", "--show", "--showformat", "${Conffiles}", owner.split(":")[0]])
    shipped = dict(line.split()[:2] for line in out.splitlines() if line.strip())
    try:
        return shipped.get(path) == hashlib.md5(Path(path).read_bytes()).hexdigest()  # noqa: S324  dpkg's choice
    except OSError:
        return False


def sites(module: AnsibleModule) -> dict[str, list[str]]:
    """Sites that somebody other than Nox set up, by proxy."""
    found: dict[str, list[str]] = {"caddy": [], "nginx": []}
    places = [
        ("caddy", "/etc/caddy/sites-enabled", "*"),
        ("nginx", "/etc/nginx/sites-enabled", "*"),
        ("nginx", "/etc/nginx/conf.d", "*.conf"),
    ]
    for proxy, directory, pattern in places:
        for path in sorted(Path(directory).glob(pattern)):
            if path.name not in ("nox-api", "nox-api.caddy", "nox-acme.conf") and not (
                path.name == "default" and pristine(module, str(path.resolve()))
            ):
                found[proxy].append(str(path))
    caddyfile = Path("/etc/caddy/Caddyfile")
    if caddyfile.is_file():
        text = caddyfile.read_text(encoding="utf-8", errors="replace")
        ours = any(f"managed by Ansible, role {role}" in text for role in ("nox_proxy", "nox_edge"))
        if not ours and not pristine(module, str(caddyfile)):
            found["caddy"].append(str(caddyfile))
    return found


def addresses() -> list[str]:
    """Global addresses of this host, in the kernel's order."""
    found: list[str] = []
    for family, target in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        # connect() on a datagram socket sends nothing: it only asks the routing table for the source
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((target, 9))
                found.append(probe.getsockname()[0])
            except OSError:
                continue
    return found


def lacks_audit() -> str:
    """Asks the kernel for its audit status, as auditctl would."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_AUDIT) as asked:
            asked.settimeout(3)
            asked.send(struct.pack("=IHHII", 16, AUDIT_GET, NLM_F_REQUEST | NLM_F_ACK, 1, 0))
            answer = asked.recv(8192)
    except OSError as error:
        return f"the kernel's audit can't be asked here ({error.strerror or error})"
    kind = struct.unpack_from("=IH", answer)[1]
    code = struct.unpack_from("=i", answer, 16)[0] if kind == NLMSG_ERROR else 0
    return f"the kernel's audit is not this host's ({os.strerror(-code)})" if code else ""


def lacks_modules() -> str:
    if not Path("/proc/modules").exists():
        return "this kernel loads no modules"
    bounds = re.search(r"(?m)^CapBnd:\s+([0-9a-f]+)", Path("/proc/self/status").read_text(encoding="ascii"))
    if bounds and not int(bounds.group(1), 16) >> CAP_SYS_MODULE & 1:
        return "the kernel is shared with other hosts, which decide what it loads"
    return ""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "settings_path": {"type": "path", "default": "/etc/default/nox-api"},
            "paths": {"type": "list", "elements": "path", "default": []},
        },
        supports_check_mode=True,
    )
    release = os_release()
    listening = listeners()
    try:
        text = Path(module.params["settings_path"]).read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    settings = parse_settings(text)
    token = token_state(settings.pop("NOX_API_TOKEN", None))
    module.exit_json(
        changed=False,
        host={
            "id": release.get("ID", "unknown"),
            "release": f"{release.get('ID', 'unknown')}-{release.get('VERSION_ID', 'unknown')}",
            "pretty": release.get("PRETTY_NAME", "unknown"),
            "codename": release.get("VERSION_CODENAME", "unknown"),
            "arch": os.uname().machine,
            "python": f"{sys.version_info.major}.{sys.version_info.minor}",
            "systemd": systemd_version(module),
            "booted_by_systemd": Path("/run/systemd/system").is_dir(),
            "root": os.geteuid() == 0,
            "cores": os.cpu_count() or 1,
            "hostname": socket.gethostname(),
            "fqdn": socket.getfqdn(),
            "addresses": addresses(),
            "lacks": {"audit": lacks_audit(), "modules": lacks_modules()},
            "mounts": {place: sorted(options) for place, options in mounts().items() if place in SHARED},
            "free_mib": {path: free_mib(path) for path in module.params["paths"]},
            "ssh_session": session_ssh_port() is not None,
            "ssh_ports": ssh_ports(listening),
            "listeners": listening,
            "proxies": [name for name in ("caddy", "nginx") if Path("/etc", name).is_dir()],
            "sites": sites(module),
            # any key that smells of a secret stays on the host
            "settings": {k: v for k, v in settings.items() if not re.search("TOKEN|SECRET|KEY", k)},
            "token": token,
        },
    )


if __name__ == "__main__":
    main()
