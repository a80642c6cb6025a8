"""What a host takes over from the machine, so that it reaches what the machine reaches.

apt sources and proxies, pip's index, certificates, name servers: all of it is read from the
machine's own configuration, none is written down here.
"""

from __future__ import annotations

import configparser
import ipaddress
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from lab.machine import run, say

DEBIAN_SUITES = ("bullseye", "bookworm", "trixie")
UBUNTU_SUITES = ("jammy",)
KEYRINGS = {
    "debian": Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
    "ubuntu": Path("/usr/share/keyrings/ubuntu-archive-keyring.gpg"),
}
CA_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")

# What a machine of each distribution may call its own release, to be replaced by a host's suite.
_RELEASES = {
    "debian": "buster bullseye bookworm trixie forky duke sid oldstable stable testing unstable",
    "ubuntu": "bionic focal jammy noble oracular plucky questing resolute",
}
_POCKETS = ("", "-updates", "-security")


# --- apt sources ---


@dataclass(frozen=True)
class Source:
    """One suite of one archive. ``signed_by`` is the path of its key; empty: apt's own will do."""

    uri: str
    suite: str
    components: tuple[str, ...]
    signed_by: str = ""

    def line(self, keyring: Path) -> str:
        """The entry for a ``sources.list``."""
        return f"deb [signed-by={keyring}] {self.uri} {self.suite} {' '.join(self.components)}"


def parse_sources_list(text: str) -> list[Source]:
    """Read one-line apt sources (``*.list``); what is no ``deb`` entry is left out."""
    found = []
    for line in text.splitlines():
        entry = re.match(r"\s*deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)((?:\s+[^\s#]+)*)", line)
        if entry:
            options, uri, suite, components = entry.groups()
            key = re.search(r"signed-by=(\S+)", options or "", re.IGNORECASE)
            found.append(Source(uri, suite, tuple(components.split()), key[1] if key else ""))
    return found


def parse_deb822(text: str) -> list[Source]:
    """Read deb822 apt sources (``*.sources``); what is disabled or no ``deb`` is left out."""
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
        enabled = fields.get("enabled", "yes").lower() not in ("no", "false", "0")
        if enabled and "deb" in fields.get("types", "").split():
            components = tuple(fields.get("components", "").split())
            found += [
                Source(uri, suite, components, fields.get("signed-by", ""))
                for uri in fields.get("uris", "").split()
                for suite in fields.get("suites", "").split()
            ]
    return found


def machine_sources(etc: Path = Path("/etc/apt")) -> list[Source]:
    """Every apt source of this machine that a host can use too, in the order apt reads them."""
    found: list[Source] = []
    for path in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]:
        if path.suffix == ".list" and path.is_file():
            found += parse_sources_list(path.read_text())
        elif path.suffix == ".sources":
            found += parse_deb822(path.read_text())
    usable = (replace(source, uri=_address(source.uri)) for source in found)
    return [source for source in usable if source.uri]


def _address(uri: str) -> str:
    """The address in an apt source that a host reaches; empty when it has none (a CD, a directory).

    Cloud images say ``mirror+file:`` and a list of addresses on their own disk: its first is taken.
    """
    if uri.startswith("mirror+file:"):
        try:
            lines = Path(uri.removeprefix("mirror+file:")).read_text().splitlines()
        except FileNotFoundError:
            return ""
        uri = next((line.split()[0] for line in lines if line.startswith("http")), "")
    return uri.rstrip("/") if uri.startswith(("http://", "https://")) else ""


def distribution(suite: str) -> str:
    return "ubuntu" if suite in UBUNTU_SUITES else "debian"


def sources_for(suite: str, sources: Iterable[Source]) -> list[Source]:
    """The machine's own archives for a suite, its updates and its security updates.

    The suite in them is replaced. Other publishers' archives, which may use the same suite names,
    are told apart by their key and components. Empty when there is no archive of the distribution.
    """
    family = distribution(suite)
    found: dict[str, Source] = {}
    for source in sources:
        release, hyphen, pocket = source.suite.partition("-")
        key = Path(source.signed_by).name
        own = "main" in source.components and (not key or key.startswith(f"{family}-archive"))
        if own and release in _RELEASES[family].split() and hyphen + pocket in _POCKETS:
            # no host needs others, and not every suite has each of the others
            components = tuple(name for name in source.components if name in ("main", "universe"))
            new = Source(source.uri, suite + hyphen + pocket, components)
            found.setdefault(hyphen + pocket, new)
    return [found[pocket] for pocket in _POCKETS if pocket in found] if "" in found else []


def reachable(source: Source) -> bool:
    """Whether apt fetches the suite's index, with the machine's proxies and certificates."""
    with tempfile.TemporaryDirectory() as directory:
        target = Path(directory) / "InRelease"
        url = f"{source.uri}/dists/{source.suite}/InRelease"
        options = ("-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=10")  # seconds
        run("/usr/lib/apt/apt-helper", *options, "download-file", url, target, check=False)
        return target.is_file()


def choose_suite(asked: str) -> str:
    """Resolve ``auto``: jammy where apt reaches an archive of Ubuntu that has it, else bookworm."""
    if asked != "auto":
        return asked
    ubuntu = sources_for("jammy", machine_sources())
    return "jammy" if ubuntu and reachable(ubuntu[0]) else "bookworm"


# --- apt and pip settings ---

# How an archive is reached, and whether its dates are believed. Not the machine's other habits
# (docker-clean and the like), nor what names a file or a program of the machine.
_APT_SETTINGS = re.compile(
    r"Acquire::(?:(?:https?|ftp)::(?!Proxy-?Auto-?Detect|CaInfo|CaPath|Ssl|IssuerCert).+|Retries|"
    r"Check-Date|Check-Valid-Until|M(?:ax|in)-ValidTime|Max-FutureTime|ForceIPv[46])"
)
_PIP_FILES = ("/etc/xdg/pip/pip.conf", "/etc/pip.conf", "~/.pip/pip.conf", "~/.config/pip/pip.conf")
_PIP_KEYS = ("index-url", "extra-index-url", "trusted-host", "proxy", "cert", "timeout", "retries")


def apt_settings(dump: str, environment: Mapping[str, str]) -> str:
    """An ``apt.conf`` with what of ``apt-config dump`` and the proxy variables a host needs too."""
    lines = [
        line
        for line in dump.splitlines()
        if _APT_SETTINGS.fullmatch(line.partition(" ")[0]) and not line.endswith(' "";')
    ]
    for scheme in ("http", "https"):
        proxy = environment.get(f"{scheme}_proxy") or environment.get(f"{scheme.upper()}_PROXY")
        setting = f"Acquire::{scheme}::Proxy "
        if proxy and not any(line.startswith(setting) for line in lines):
            lines.append(f'{setting}"{proxy}";')
    return "".join(line + "\n" for line in lines)


def pip_config(texts: Iterable[str], environment: Mapping[str, str]) -> str:
    """A ``pip.conf`` with the settings that decide how an index is reached; empty without any.

    Later texts win over earlier ones, the ``PIP_…`` variables over all. What names a file of the
    machine (find-links, ``file:`` indexes, any certificate but the system's) is left out.
    """
    values: dict[str, str] = {}
    for text in texts:
        parser = configparser.RawConfigParser(strict=False)
        try:
            parser.read_string(text)
        except configparser.Error:
            continue  # pip says so itself
        if parser.has_section("global"):
            values |= {key.replace("_", "-"): value for key, value in parser.items("global")}
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
            lines.append(f"{key} = {' '.join(words)}\n")
    return "[global]\n" + "".join(lines) if lines else ""


# --- certificates and name servers ---

_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----\s+(.*?)\s+-----END CERTIFICATE-----", re.S)


def certificates(bundle: str) -> dict[str, str]:
    """The certificates (PEM) of a bundle, keyed by their content: that of two bundles compares."""
    return {"".join(match[1].split()): match[0] + "\n" for match in _CERTIFICATE.finditer(bundle)}


def machine_certificates() -> str:
    """This machine's certificate bundle (PEM); empty when it has none."""
    return CA_BUNDLE.read_text() if CA_BUNDLE.is_file() else ""


def resolver(texts: Iterable[str]) -> str:
    """The first of these ``resolv.conf`` texts that names a server a host can reach, too.

    Servers on the machine's loopback are left out. Empty when no text is left.
    """
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
                kept.append(line + "\n")
        if servers:
            return "".join(kept)
    return ""


@cache
def files() -> dict[str, str]:
    """The files (path without its first slash -> text) that make a host reach what we reach."""
    # The second is systemd-resolved's list of the servers behind its stub on the loopback.
    lists = [Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf")]
    pip = [Path(name).expanduser() for name in _PIP_FILES]
    found = {
        "etc/resolv.conf": resolver(path.read_text() for path in lists if path.is_file()),
        "etc/apt/apt.conf.d/99lab": apt_settings(run("apt-config", "dump"), os.environ),
    }
    config = pip_config([path.read_text() for path in pip if path.is_file()], os.environ)
    if config:
        found["etc/pip.conf"] = config
    if not found["etc/resolv.conf"]:
        say("this machine's name servers are on its loopback: hosts will resolve no names")
    if re.search(r"//(localhost|127\.|\[::1\])", "".join(found.values())):
        say("a proxy or index of this machine is on its loopback: hosts can't reach it")
    return found
