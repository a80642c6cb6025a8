"""The root that hosts start from: built once per recipe, cached, unchanged under its hosts."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from lab import inherited
from lab.machine import need_tools, run, say, step
from lab.state import CACHE, LabError, locked

# What a small cloud server has at the least: init, login, network, Python for Ansible. No web
# server, firewall or curl: a role must bring what it needs.
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
ADMIN_ID = 1000  # user and group of the second login, `admin`
# The package lists in a base are of the day it was built. After this many days, updates that they
# name may be gone from the archive, and a host's first `apt install` would meet a 404.
MAX_AGE_DAYS = 7
_FORMAT = 2  # raise it when _customize() or a kind's finishing changes: older caches then don't fit


@dataclass(frozen=True)
class Recipe:
    """All that decides what a base holds: equal recipes share a cached one."""

    suite: str
    kind: str
    packages: tuple[str, ...]
    sources: tuple[inherited.Source, ...]
    certificates: str
    kernel: str  # of a kind that brings its own, else empty
    format: int = _FORMAT

    @property
    def prefix(self) -> str:
        """What the names of its cached bases start with; the time it was built follows."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.suite}-{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def recipe(suite: str, kind: str, packages: tuple[str, ...] = (), kernel: str = "") -> Recipe:
    """The recipe for a suite on this machine, with packages beyond PACKAGES.

    Raises LabError when its apt sources hold no archive for it, or the archive's key is missing.
    """
    sources = inherited.sources_for(suite, inherited.machine_sources())
    family = inherited.distribution(suite)
    keyring = inherited.KEYRINGS[family]
    if not sources:
        raise LabError(
            f"{suite} can't be fetched: no archive of {family.capitalize()} is among the machine's "
            "apt sources; add one under /etc/apt/sources.list.d, or choose another with --suite"
        )
    if not keyring.is_file():
        package = "ubuntu-keyring" if family == "ubuntu" else "debian-archive-keyring"
        raise LabError(f"{suite} is signed with {keyring}, which is missing: apt install {package}")
    certificates = inherited.machine_certificates()
    return Recipe(suite, kind, PACKAGES + packages, tuple(sources), certificates, kernel)


def kernel_of(base: str) -> str:
    """The kernel that a base was built for."""
    return str(json.loads((Path(base) / "recipe.json").read_text()).get("kernel", ""))


def _built(path: Path) -> int:
    """When a cached base was built, in seconds since the epoch."""
    return int(path.suffix[1:])


def base_for(wanted: Recipe, finish: Callable[[Path], None] | None = None) -> Path:
    """The directory of a cached base, which is built when it is missing or too old.

    Its root is ``root`` in there, unless ``finish``, called with that path, makes it another thing.
    Raises LabError when it can't be built and there is no older one.
    """
    with locked(f"-{wanted.prefix}"):
        found = max(CACHE.glob(f"{wanted.prefix}.*"), key=_built, default=None)
        if found and time.time() - _built(found) < MAX_AGE_DAYS * 86400:
            return found
        try:
            return _build(wanted, finish)
        except LabError as exc:
            if not found:
                raise
            say(f"{exc}\nlab: so hosts get the {wanted.suite} base of over {MAX_AGE_DAYS} days ago")
            return found


def _build(wanted: Recipe, finish: Callable[[Path], None] | None) -> Path:
    need_tools({"mmdebstrap": "mmdebstrap"})
    CACHE.mkdir(parents=True, exist_ok=True)
    what = f"building the {wanted.suite} base for {wanted.kind} hosts (once in {MAX_AGE_DAYS} days)"
    building = Path(tempfile.mkdtemp(dir=CACHE, prefix=".building-"))
    building.chmod(0o755)  # apt's own user must get through
    try:
        with step(what):
            root = building / "root"
            _bootstrap(wanted, root)
            _customize(wanted, root)
            if finish:
                finish(root)
        (building / "recipe.json").write_text(json.dumps(asdict(wanted), indent=1) + "\n")
        done = CACHE / f"{wanted.prefix}.{int(time.time())}"
        building.rename(done)
    finally:
        remove_tree(building)
    return done


def _bootstrap(wanted: Recipe, root: Path) -> None:
    keyring = inherited.KEYRINGS[inherited.distribution(wanted.suite)]
    # An old suite loses its updates or security archive some day: take those that are there.
    optional = [source for source in wanted.sources[1:] if inherited.reachable(source)]
    settings = root.with_name("apt-settings")
    settings.write_text(inherited.files()["etc/apt/apt.conf.d/99lab"])
    options = [
        "--variant=minbase",
        f"--include={','.join(wanted.packages)}",
        f"--aptopt={settings}",
    ]
    if wanted.suite == "bullseye":
        # Newer suites are merged by their packages. Only the first half of mmdebstrap's hook: the
        # other half looks for a package that bullseye hasn't.
        options.append("--setup-hook=/usr/share/mmdebstrap/hooks/merged-usr/setup00.sh")
    lines = [source.line(keyring) for source in (wanted.sources[0], *optional)]
    run("mmdebstrap", "--quiet", *options, wanted.suite, root, *lines)
    settings.unlink()


def _customize(wanted: Recipe, root: Path) -> None:
    etc = root / "etc"
    (etc / "apt/apt.conf.d/99mmdebstrap").rename(etc / "apt/apt.conf.d/99lab")
    (etc / "default/locale").write_text("LANG=C.UTF-8\n")

    have = inherited.certificates((etc / "ssl/certs/ca-certificates.crt").read_text())
    machines = inherited.certificates(wanted.certificates)
    for number, content in enumerate(sorted(machines.keys() - have.keys()), start=1):
        path = root / f"usr/local/share/ca-certificates/machine-{number}.crt"
        path.write_text(machines[content])
    run("chroot", root, "update-ca-certificates")

    # A second login, as servers have one where root's is closed.
    login = ("--create-home", "--shell=/bin/bash", f"--uid={ADMIN_ID}", "--user-group", "admin")
    run("chroot", root, "useradd", *login)
    sudoers = etc / "sudoers.d/90-admin"
    sudoers.write_text("admin ALL=(ALL) NOPASSWD: ALL\n")
    sudoers.chmod(0o440)

    run("chroot", root, "systemctl", "enable", "systemd-networkd")

    # With lists of today, a host's first `apt install` needs no update.
    (etc / "resolv.conf").unlink(missing_ok=True)
    (etc / "resolv.conf").write_text(inherited.files()["etc/resolv.conf"])
    run("chroot", root, "apt-get", "-qq", "update")

    # These are each host's own.
    for path in [*(etc / "ssh").glob("ssh_host_*"), etc / "hostname"]:
        path.unlink(missing_ok=True)
    (etc / "machine-id").write_text("")


@dataclass(frozen=True)
class HostFile:
    """A file that is one host's own; a directory when ``text`` is None.

    ``path`` is without the first slash, ``owner`` the number of both user and group.
    """

    path: str
    text: str | None
    mode: int = 0o644
    owner: int = 0


def host_files(files: dict[str, str], public_key: str) -> list[HostFile]:
    """What makes a root a certain host: files (path -> text), and who may log in."""
    found = [HostFile(path, text, 0o600 if path.endswith("_key") else 0o644) for path, text in files.items()]
    for home, owner in (("root", 0), ("home/admin", ADMIN_ID)):
        found.append(HostFile(f"{home}/.ssh", None, 0o700, owner))
        found.append(HostFile(f"{home}/.ssh/authorized_keys", public_key, 0o600, owner))
    return found


def write_files(root: Path, files: Iterable[HostFile]) -> None:
    """Write a host's own files into its root."""
    for file in files:
        path = root / file.path
        if file.text is None:
            path.mkdir(exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # a symlink there would lead out of the root
            path.write_text(file.text)
        path.chmod(file.mode)
        os.chown(path, file.owner, file.owner)


def remove_tree(path: Path) -> None:
    """Remove a directory tree, but nothing that is mounted in it."""
    if path.exists():
        run("rm", "-rf", "--one-file-system", path)


def drop_expired(used: set[str]) -> None:
    """Remove old bases that no host stands on, and what builds that were killed left."""
    long_ago = time.time() - 2 * MAX_AGE_DAYS * 86400
    for path in [*CACHE.glob("*-*-*.*"), *CACHE.glob(".building-*")]:
        built = _built(path) if path.suffix[1:].isdigit() else path.stat().st_mtime
        if built < long_ago and str(path) not in used and not path.name.startswith("kernel-"):
            remove_tree(path)


def purge(used: set[str]) -> list[str]:
    """Remove all caches but the bases that hosts stand on; returns the names of what is kept."""
    kept = []
    for path in sorted(CACHE.glob("*")):
        if str(path) in used:
            kept += [path.name, kernel_of(str(path))]
    for path in CACHE.glob("*"):
        at_work = path.name.startswith(".building-") and time.time() - path.stat().st_mtime < 3600
        if path.name not in kept and not at_work:
            remove_tree(path)
    if CACHE.is_dir() and not any(CACHE.iterdir()):
        CACHE.rmdir()
    return [name for name in kept if name]
