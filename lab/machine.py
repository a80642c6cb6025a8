"""What the machine brings along: whether it can host, its tools, apt sources, proxies, certificates and resolver."""

from __future__ import annotations

import configparser
import ipaddress
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lab.state import CannotHost, LabError

CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
APT_HELPER = Path("/usr/lib/apt/apt-helper")
_CAP_SYS_ADMIN = 21
_CAP_NET_ADMIN = 12

DEBIAN_SUITES = ("bullseye", "bookworm", "trixie")
UBUNTU_SUITES = ("jammy",)
KEYRINGS = {
    "debian": Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
    "ubuntu": Path("/usr/share/keyrings/ubuntu-archive-keyring.gpg"),
}


def say(message: str) -> None:
    print(f"lab: {message}", file=sys.stderr, flush=True)


@contextmanager
def step(message: str) -> Iterator[None]:
    """Say what takes long before it starts, and how long it took."""
    say(f"{message} …")
    started = time.monotonic()
    yield
    say(f"{message}: {time.monotonic() - started:.1f} s")


def run(*command: str | Path, check: bool = True, stdin: str | None = None) -> str:
    """Run a command and return its output.

    Raises LabError with the command's own last words when it fails (unless ``check`` is false).
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            input=stdin if stdin is not None else "",
            capture_output=True,
            text=True,
            env={**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"},
        )
    except FileNotFoundError:
        raise LabError(f"{words[0]} is missing; install the package that brings it") from None
    if check and done.returncode != 0:
        tail = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-15:])
        raise LabError(f"failed ({done.returncode}): {' '.join(words)}\n{tail}")
    return done.stdout


def check_machine() -> None:
    """Raises CannotHost, in one line, when this machine can't run lab hosts. Changes nothing."""
    if os.geteuid() != 0:
        raise CannotHost(
            "lab hosts need root: run it with sudo, or on a machine where you are root"
        )
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise CannotHost("lab hosts need Debian or Ubuntu: this machine has no apt-get and dpkg")
    capabilities = re.search(r"^CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text(), re.M)
    held = int(capabilities[1], 16) if capabilities else 0
    for bit, name in ((_CAP_SYS_ADMIN, "CAP_SYS_ADMIN"), (_CAP_NET_ADMIN, "CAP_NET_ADMIN")):
        if not held >> bit & 1:
            raise CannotHost(
                f"root lacks {name} here (an unprivileged container?): lab hosts need it"
            )
    known = Path("/proc/filesystems").read_text().split()
    modules = Path("/lib/modules") / os.uname().release
    for filesystem in ("overlay", "cgroup2"):
        if filesystem not in known and not modules.is_dir():
            raise CannotHost(
                f"this kernel ({os.uname().release}) has no {filesystem} file system: lab hosts need it"
            )


def need_tools(tools: dict[str, str]) -> None:
    """Install the Debian packages of those commands (command -> packages) that are missing, and say so.

    Raises LabError when apt can't.
    """
    packages = sorted({word for command, words in tools.items() if not shutil.which(command) for word in words.split()})
    if not packages:
        return
    # Another apt at work on the machine is waited for; the lists may be older than the archive, or absent.
    apt = ("apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300")
    with step(f"installing on this machine with apt: {' '.join(packages)}"):
        run(*apt, "update")
        run(*apt, "install", "--yes", "--no-install-recommends", *packages)


def has_systemd() -> bool:
    """Whether PID 1 of this machine is a systemd that takes units (what sd_booted() checks, and then PID 1 itself:
    installing systemd's packages is enough to create the directory)."""
    return (
        Path("/run/systemd/system").is_dir()
        and Path("/proc/1/comm").read_text().strip() == "systemd"
    )


def default_mtu() -> int:
    """The MTU, in bytes, of the interface with the default route; 1500 when there is none."""
    routes = json.loads(run("ip", "-json", "route", "show", "default") or "[]")
    for route in routes:
        mtu = Path(f"/sys/class/net/{route.get('dev')}/mtu")
        if mtu.is_file():
            return int(mtu.read_text())
    return 1500


# --- apt ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """One archive in one suite, as apt has it: ``deb URI SUITE COMPONENTS``."""

    uri: str
    suite: str
    components: tuple[str, ...]
    signed_by: str = ""

    def line(self, keyring: Path) -> str:
        return f"deb [signed-by={keyring}] {self.uri} {self.suite} {' '.join(self.components)}"


def parse_sources_list(text: str) -> list[Source]:
    """Read one-line apt sources (``sources.list``). Lines that are no ``deb`` entry are left out."""
    found = []
    for line in text.splitlines():
        entry = re.match(r"\s*deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)((?:\s+[^\s#]+)*)", line)
        if entry:
            options, uri, suite, components = entry.groups()
            signed_by = re.search(r"signed-by=(\S+)", options or "", re.I)
            found.append(
                Source(
                    uri.rstrip("/"),
                    suite,
                    tuple(components.split()),
                    signed_by[1] if signed_by else "",
                )
            )
    return found


def parse_deb822(text: str) -> list[Source]:
    """Read deb822 apt sources (``*.sources``). Stanzas that are disabled or no ``deb`` are left out."""
    found = []
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        key = ""
        for line in stanza.splitlines():
            if line.startswith("#"):
                continue
            if line[:1].isspace() and key:
                fields[key] += " " + line.strip()
            elif ":" in line:
                key, _, value = line.partition(":")
                key = key.strip().lower()
                fields[key] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() in (
            "no",
            "false",
            "0",
        ):
            continue
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                components = tuple(fields.get("components", "").split())
                found.append(
                    Source(uri.rstrip("/"), suite, components, fields.get("signed-by", ""))
                )
    return found


def machine_sources(etc: Path = Path("/etc/apt")) -> list[Source]:
    """Every apt source of this machine, in the order apt reads them."""
    found = []
    main = etc / "sources.list"
    if main.is_file():
        found += parse_sources_list(main.read_text())
    for path in sorted((etc / "sources.list.d").glob("*")):
        if path.suffix == ".list":
            found += parse_sources_list(path.read_text())
        elif path.suffix == ".sources":
            found += parse_deb822(path.read_text())
    return [source for entry in found for source in _resolve_mirror_list(entry)]


def _resolve_mirror_list(source: Source) -> list[Source]:
    """Cloud images say ``mirror+file:/etc/apt/mirrors/…``: a host has no such file, so take the address in it."""
    if not source.uri.startswith("mirror+file:"):
        return [source] if source.uri.startswith(("http://", "https://")) else []
    try:
        lines = Path(source.uri.removeprefix("mirror+file:")).read_text().splitlines()
    except FileNotFoundError:
        return []
    addresses = [
        line.split()[0].rstrip("/") for line in lines if line.startswith(("http://", "https://"))
    ]
    return [
        Source(address, source.suite, source.components, source.signed_by)
        for address in addresses[:1]
    ]


def distribution(suite: str) -> str:
    return "ubuntu" if suite in UBUNTU_SUITES else "debian"


_UBUNTU_NAMES = ("bionic", "focal", "jammy", "noble", "oracular", "plucky", "questing", "resolute")
_DEBIAN_NAMES = (
    "buster",
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "sid",
    "oldstable",
    "stable",
    "testing",
    "unstable",
)


def sources_for(suite: str, sources: Iterable[Source]) -> list[Source]:
    """The machine's own archives with the suite replaced: the suite itself, its updates and its security updates.

    Archives of other publishers that use the same suite name are told apart by their key and components. Empty when
    the machine has no archive of that distribution.
    """
    kind = distribution(suite)
    names = _UBUNTU_NAMES if kind == "ubuntu" else _DEBIAN_NAMES
    found: dict[str, Source] = {}
    for source in sources:
        key = Path(source.signed_by).name
        if "main" not in source.components or (key and not key.startswith(f"{kind}-archive")):
            continue
        for suffix in ("", "-updates", "-security"):
            if (
                suffix not in found
                and source.suite.removesuffix(suffix) in names
                and source.suite.endswith(suffix)
            ):
                # non-free-firmware is newer than bullseye; nothing of the lab needs more than these
                components = tuple(c for c in source.components if c in ("main", "universe"))
                found[suffix] = Source(source.uri, suite + suffix, components)
    return (
        [found[suffix] for suffix in ("", "-updates", "-security") if suffix in found]
        if "" in found
        else []
    )


def reachable(source: Source) -> bool:
    """Whether apt, with this machine's proxies and certificates, can fetch this suite's index."""
    with tempfile.TemporaryDirectory() as directory:
        url = f"{source.uri}/dists/{source.suite}/InRelease"
        target = Path(directory) / "InRelease"
        run(
            APT_HELPER,
            "-o",
            "Acquire::Retries=1",
            "-o",
            "Acquire::http::Timeout=10",
            "download-file",
            url,
            target,
            check=False,
        )
        return target.is_file()


def choose_suite(asked: str) -> str:
    """Resolve ``auto``: jammy where this machine's apt reaches an Ubuntu archive that has it, else bookworm."""
    if asked != "auto":
        return asked
    ubuntu = sources_for("jammy", machine_sources())
    return "jammy" if ubuntu and reachable(ubuntu[0]) else "bookworm"


# What a host must share to reach the same archives. Not the machine's other habits (docker-clean and the like), and
# not Proxy-Auto-Detect, which names a program of the machine.
_APT_SETTINGS = re.compile(
    r"Acquire::(?:(?:https?|ftp)::(?!Proxy-Auto-Detect|ProxyAutoDetect).+|Check-Date|Check-Valid-Until|Max-ValidTime|"
    r"Min-ValidTime|ForceIPv4|ForceIPv6|Retries|Max-FutureTime)"
)


def apt_settings(dump: str, environment: dict[str, str]) -> list[str]:
    """The lines of ``apt-config dump`` that decide how an archive is reached, plus the proxies of the environment."""
    lines = []
    for line in dump.splitlines():
        name, _, value = line.partition(" ")
        if _APT_SETTINGS.fullmatch(name) and value not in ('"";', ""):
            lines.append(line)
    for scheme in ("http", "https"):
        proxy = environment.get(f"{scheme}_proxy") or environment.get(f"{scheme.upper()}_PROXY")
        setting = f"Acquire::{scheme}::Proxy "
        if proxy and not any(line.startswith(setting) for line in lines):
            lines.append(f'{setting}"{proxy}";')
    return lines


def machine_apt_settings() -> list[str]:
    return apt_settings(run("apt-config", "dump"), dict(os.environ))


# --- pip, certificates, resolver ---------------------------------------------------------------------------------

_PIP_FILES = ("/etc/xdg/pip/pip.conf", "/etc/pip.conf", "~/.pip/pip.conf", "~/.config/pip/pip.conf")
_PIP_KEYS = ("index-url", "extra-index-url", "trusted-host", "proxy", "cert", "timeout", "retries")


def pip_config(texts: Iterable[str], environment: dict[str, str]) -> str:
    """The settings of pip that decide how an index is reached, as a ``pip.conf``; empty when there are none.

    Directories of this machine (find-links, ``file:`` indexes) mean nothing on a host and are left out, and so is any
    certificate file but the system's bundle. Later texts win, the environment (``PIP_…``) wins over all.
    """
    values: dict[str, str] = {}
    for text in texts:
        parser = configparser.RawConfigParser(strict=False)
        try:
            parser.read_string(text)
        except configparser.Error:
            continue
        if parser.has_section("global"):
            values.update({key.replace("_", "-"): value for key, value in parser.items("global")})
    for key in _PIP_KEYS:
        value = environment.get("PIP_" + key.replace("-", "_").upper())
        if value:
            values[key] = value
    lines = []
    for key in _PIP_KEYS:
        words = [
            word
            for word in values.get(key, "").split()
            if not word.startswith(("file:", "/")) or word == str(CA_BUNDLE)
        ]
        if words:
            lines.append(f"{key} = {' '.join(words)}")
    return "\n".join(["[global]", *lines, ""]) if lines else ""


def machine_pip_config() -> str:
    paths = [Path(name).expanduser() for name in _PIP_FILES]
    return pip_config([path.read_text() for path in paths if path.is_file()], dict(os.environ))


_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----\s+(.*?)\s+-----END CERTIFICATE-----", re.S)


def certificates(bundle: str) -> dict[str, str]:
    """The certificates of a PEM bundle, keyed by their content without white space, so that two bundles compare."""
    return {"".join(match[1].split()): match[0] + "\n" for match in _CERTIFICATE.finditer(bundle)}


def machine_certificates() -> str:
    """This machine's certificate bundle (PEM); empty when it has none."""
    return CA_BUNDLE.read_text() if CA_BUNDLE.is_file() else ""


def resolver(texts: Iterable[str]) -> str:
    """The first of these ``resolv.conf`` texts with a name server a host can reach too, without the loopback ones."""
    for text in texts:
        kept = []
        servers = 0
        for line in text.splitlines():
            words = line.split()
            if words[:1] == ["nameserver"] and len(words) > 1:
                if ipaddress.ip_address(words[1].partition("%")[0]).is_loopback:
                    continue
                servers += 1
            if words and words[0] in ("nameserver", "search", "domain", "options"):
                kept.append(line)
        if servers:
            return "\n".join(kept) + "\n"
    return ""


def machine_resolver() -> str:
    # The second is systemd-resolved's list of the real servers behind its stub on 127.0.0.53.
    paths = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))
    return resolver(path.read_text() for path in paths if path.is_file())
