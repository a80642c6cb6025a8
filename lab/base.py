"""The root file system that hosts start from: built once per recipe, cached, never changed while hosts stand on it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from lab import machine
from lab.machine import KEYRINGS, run, say, step
from lab.state import CACHE, LabError, locked

# What a small cloud server has at least: init, login, network, Python for Ansible. No web server, firewall or curl:
# a role must bring what it needs.
PACKAGES = (
    "systemd",
    "systemd-sysv",
    "dbus",
    "udev",
    "python3",
    "openssh-server",
    "iproute2",
    "ca-certificates",
    "sudo",
)
# The package lists inside age with the base; after this many days security updates in them may be gone from the
# archive, and a host's first `apt install` would meet a 404.
MAX_AGE_DAYS = 7
ADMIN_ID = 1000  # user and group of the second login
_FORMAT = 1  # raise it when customize() changes, so that older caches aren't used


@dataclass(frozen=True)
class Recipe:
    """All that decides what a base holds. Two equal recipes share a cached base."""

    suite: str
    kind: str
    packages: tuple[str, ...]
    sources: tuple[machine.Source, ...]
    apt_settings: tuple[str, ...]
    pip_config: str
    certificates: str
    kernel: str = ""  # of a kind that brings its own
    format: int = _FORMAT

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def prefix(self) -> str:
        return f"{self.suite}-{self.kind}-{self.digest}"


def recipe(suite: str, kind: str, extra_packages: tuple[str, ...] = (), kernel: str = "") -> Recipe:
    """The recipe of this machine for a suite.

    Raises LabError when its apt sources hold no archive for it, or the archive's key is missing.
    """
    sources = machine.sources_for(suite, machine.machine_sources())
    family = machine.distribution(suite)
    if not sources:
        raise LabError(
            f"no {family.capitalize()} archive is among this machine's apt sources, so {suite} can't be fetched; "
            "choose another with --suite, or add one under /etc/apt/sources.list.d"
        )
    if not KEYRINGS[family].is_file():
        package = "ubuntu-keyring" if family == "ubuntu" else "debian-archive-keyring"
        raise LabError(
            f"{KEYRINGS[family]} is missing, which {suite} is signed with: apt-get install {package}"
        )
    return Recipe(
        suite=suite,
        kind=kind,
        packages=PACKAGES + extra_packages,
        sources=tuple(sources),
        apt_settings=tuple(machine.machine_apt_settings()),
        pip_config=machine.machine_pip_config(),
        certificates=machine.machine_certificates(),
        kernel=kernel,
    )


def cached(wanted: Recipe) -> tuple[Path, bool] | None:
    """The newest cached base of this recipe and whether it is still fresh; None when there is none."""
    found = sorted(CACHE.glob(f"{wanted.prefix}.*"), key=lambda path: int(path.suffix[1:]))
    if not found:
        return None
    return found[-1], time.time() - int(found[-1].suffix[1:]) < MAX_AGE_DAYS * 86400


def recipe_of(base_dir: str) -> dict[str, str]:
    """The recipe a cached base was built from."""
    found: dict[str, str] = json.loads((Path(base_dir) / "recipe.json").read_text())
    return found


def base_for(wanted: Recipe, finish: Callable[[Path], None] | None = None) -> Path:
    """The directory of a cached base, which is built when it is missing or too old.

    Its root is in there as ``root``, unless ``finish``, called on the new root, makes something else of it.
    Raises LabError when it can't be built and no older one is there.
    """
    with locked(f"base-{wanted.prefix}"):
        found = cached(wanted)
        if found and found[1]:
            return found[0]
        try:
            return _build(wanted, finish)
        except LabError as exc:
            if not found:
                raise
            say(
                f"the {wanted.suite} base is over {MAX_AGE_DAYS} days old and can't be renewed, taking it all the same:\n{exc}"
            )
            return found[0]


def _build(wanted: Recipe, finish: Callable[[Path], None] | None) -> Path:
    machine.need_tools({"mmdebstrap": "mmdebstrap"})
    CACHE.mkdir(parents=True, exist_ok=True)
    building = CACHE / f".building-{wanted.prefix}"
    remove_tree(building)  # what a killed build left; the lock says nobody is at it
    building.mkdir()
    building.chmod(0o755)
    try:
        with step(
            f"building the {wanted.suite} base for {wanted.kind} hosts (kept for {MAX_AGE_DAYS} days)"
        ):
            build_root(wanted, building / "root")
            if finish:
                finish(building / "root")
        (building / "recipe.json").write_text(json.dumps(asdict(wanted), indent=1) + "\n")
        done = CACHE / f"{wanted.prefix}.{int(time.time())}"
        building.rename(done)
    finally:
        remove_tree(building)
    return done


def build_root(wanted: Recipe, root: Path) -> None:
    """Bootstrap and customize a root at ``root``."""
    keyring = KEYRINGS[machine.distribution(wanted.suite)]
    # Old suites lose their -updates or -security at some time: take what the archive still has.
    sources = [
        source
        for source in wanted.sources
        if source.suite == wanted.suite or machine.reachable(source)
    ]
    settings = root.parent / "apt-settings"
    settings.write_text("".join(line + "\n" for line in wanted.apt_settings))
    command = [
        "mmdebstrap",
        "--quiet",
        "--variant=minbase",
        f"--include={','.join(wanted.packages)}",
        f"--aptopt={settings}",
    ]
    if wanted.suite == "bullseye":  # newer suites are merged by their own packages
        # the set-up half of the hook; its other half checks for a package that bullseye hasn't
        command.append("--setup-hook=/usr/share/mmdebstrap/hooks/merged-usr/setup00.sh")
    run(*command, wanted.suite, root, *(source.line(keyring) for source in sources))
    settings.unlink()
    _customize(wanted, root)


def _customize(wanted: Recipe, root: Path) -> None:
    etc = root / "etc"
    (etc / "apt/apt.conf.d/99mmdebstrap").rename(etc / "apt/apt.conf.d/99lab")
    if wanted.pip_config:
        (etc / "pip.conf").write_text(wanted.pip_config)
    (etc / "default/locale").write_text("LANG=C.UTF-8\n")

    known = machine.certificates((etc / "ssl/certs/ca-certificates.crt").read_text())
    wanted_certificates = machine.certificates(wanted.certificates)
    added = root / "usr/local/share/ca-certificates"
    for number, body in enumerate(sorted(wanted_certificates.keys() - known.keys())):
        (added / f"machine-{number}.crt").write_text(wanted_certificates[body])
    run("chroot", root, "update-ca-certificates")

    # A second login, as servers have it where root's is closed.
    run(
        "chroot",
        root,
        "useradd",
        f"--uid={ADMIN_ID}",
        "--user-group",
        "--create-home",
        "--shell=/bin/bash",
        "admin",
    )
    sudoers = etc / "sudoers.d/90-admin"
    sudoers.write_text("admin ALL=(ALL) NOPASSWD: ALL\n")
    sudoers.chmod(0o440)

    run("chroot", root, "systemctl", "enable", "systemd-networkd")

    # Package lists of now, so that a host's first `apt install` needs no update.
    (etc / "resolv.conf").unlink(missing_ok=True)
    (etc / "resolv.conf").write_text(machine.machine_resolver())
    run("chroot", root, "apt-get", "-qq", "update")

    # What must be each host's own.
    for path in [*(etc / "ssh").glob("ssh_host_*"), etc / "resolv.conf", etc / "hostname"]:
        path.unlink(missing_ok=True)
    (etc / "machine-id").write_text("")


@dataclass(frozen=True)
class HostFile:
    """A file of one host, its path without the leading slash; a directory when ``text`` is None."""

    path: str
    text: str | None
    mode: int = 0o644
    owner: int = 0  # user and group


def host_files(files: dict[str, str], public_key: str) -> list[HostFile]:
    """What makes a root one host: ``files`` (path -> text) and who may log in with the key."""
    entries = [
        HostFile(path, text, 0o600 if path.endswith("_key") else 0o644)
        for path, text in files.items()
    ]
    for home, owner in (("root", 0), ("home/admin", ADMIN_ID)):
        entries.append(HostFile(f"{home}/.ssh", None, 0o700, owner))
        entries.append(HostFile(f"{home}/.ssh/authorized_keys", public_key, 0o600, owner))
    return entries


def write_files(root: Path, entries: list[HostFile]) -> None:
    """Write a host's files into its root."""
    for entry in entries:
        path = root / entry.path
        if entry.text is None:
            path.mkdir(exist_ok=True)
        else:
            path.unlink(
                missing_ok=True
            )  # never through a symlink, which would lead out of the root
            path.write_text(entry.text)
        path.chmod(entry.mode)
        os.chown(path, entry.owner, entry.owner)


def remove_tree(path: Path) -> None:
    """Remove a directory tree, but nothing that is mounted in it."""
    if path.exists():
        run("rm", "-rf", "--one-file-system", path)


def purge(used: set[str]) -> list[str]:
    """Remove the cached bases that no host stands on; returns the names of those kept."""
    kept = []
    for path in sorted(CACHE.glob("*")) + sorted(CACHE.glob(".building-*")):
        if str(path) in used:
            kept.append(path.name)
        else:
            remove_tree(path)
    if not kept:
        shutil.rmtree(CACHE, ignore_errors=True)
    return kept
