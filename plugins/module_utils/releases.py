# SPDX-License-Identifier: Apache-2.0
"""Releases on a host: checked, unpacked beside each other, switched by one rename, remembered. What nox_release does."""

from __future__ import annotations

import fcntl
import gzip
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from . import release_files
from .archives import own_places
from .commands import run
from .digests import digest_of, digest_of_file
from .release_files import (
    BROUGHT,
    MADE,
    Unlisted,
    brought_problem,
    foreign_writer,
    read_made,
    read_manifest,
    read_release,
    release_problem,
    whole_manifest,
    write_made,
)

PIP = re.compile(r"/site-packages/pip/")  # no service imports it
COMPILED = re.compile(r"__pycache__/([^/]+)\.cpython-\d+\.pyc$")


class Failed(Exception):
    """It can't be done; the message says why, and what still runs."""


class Wanted(NamedTuple):
    """The options of nox_release."""

    id: str
    sha256: str
    archive: str
    root: Path
    keep: int
    record: str
    state: str
    check_mode: bool


def extract(archive: bytes, scratch: Path) -> dict[str, str]:
    """Everything in an archive → below scratch. Name → digest, or "-> target" of a link, as the release's own list has them.

    The archive's digest vouches for what is in it; what is refused here is for the day somebody signs a wrong one.
    """
    found, directories = {}, {""}
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(archive))) as tar:
        for member in tar:
            name, path = member.name, f"{scratch}/{member.name}"
            place, _, last = name.rpartition("/")
            if (
                place not in directories
                or last in ("", ".", "..")
                or not (member.isreg() or member.isdir() or member.issym())
            ):
                raise Failed(f"refuses to unpack {name!r}")
            if member.isdir():
                os.mkdir(path, 0o755)  # noqa: PTH102  of two thousand, no Path is made of any
                directories.add(name)
            elif member.issym():
                os.symlink(member.linkname, path)  # noqa: PTH211
                found[name] = f"-> {member.linkname}"
            else:
                handle = tar.extractfile(member)
                content = handle.read() if handle else b""
                write(path, content, member.mode & 0o755)
                found[name] = digest_of(content)
    return found


def write(path: str, content: bytes, mode: int = 0o644) -> None:
    """A new file, all of it: what isn't buffered may be written in part without a word, on a disk that fills."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as handle:  # noqa: PTH123
        handle.write(content)


def unpack(root: Path, archive: Path, sha256: str, directory: Path) -> None:
    """Archive → directory, by a rename when all of it is there and checked. Raises Failed."""
    try:
        data = archive.read_bytes()
    except OSError as error:
        raise Failed(f"{archive}: {error.strerror}") from error
    if digest_of(data) != sha256:
        raise Failed(f"{archive}: SHA-256 is {digest_of(data)}, should be {sha256}. Delete it and run again.")
    directory.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}.partial-"))
    try:
        scratch.chmod(0o755)
        try:
            found = extract(data, scratch)
            release = read_release(scratch)
        except (Failed, Unlisted, tarfile.TarError, zlib.error, EOFError, ValueError) as problem:
            raise Failed(f"{archive}: {problem}") from problem
        del found[BROUGHT]
        if wrong := sorted(name for name, _ in set(found.items()) ^ set(release["files"].items())):
            raise Failed(f"{archive}: {wrong[0]} is not as its list says")
        compile_all(root, scratch, directory, release)
        write_made(scratch)
        try_out(scratch)
        if directory.exists():
            aside = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}.broken-"))
            directory.rename(aside / "old")
            scratch.rename(directory)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            scratch.rename(directory)
    except OSError as error:
        raise Failed(f"{directory}: {error.strerror or error}. The running release goes on.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def compile_all(root: Path, scratch: Path, directory: Path, release: dict[str, Any]) -> None:
    """Compiles a release, which is to be `directory`, where it lies, once: the services can't write below it, and would
    compile at every start."""
    packages = f"venv/lib/python{release['python']}/site-packages"
    others = [root / "releases" / name for name in complete_releases(root)[0] if name != directory.name]
    carried = carry_over(others, scratch, release["files"])
    left = [
        f"{scratch}/{name}"
        for name in release["files"]
        if name.startswith(packages) and name.endswith(".py") and not PIP.search(name) and name not in carried
    ]
    if not left:  # given nothing, it would compile all of sys.path
        return
    command = [str(scratch / "venv/bin/python3"), "-I", "-m", "compileall", "-q"]
    command += ["--invalidation-mode", "unchecked-hash"]
    command += ["-s", str(scratch), "-p", str(root / "current")]
    # a list of files is compiled by one process, a directory by one per core
    command += ["-i", "-"] if carried else ["-j", "0", "-x", PIP.pattern, str(scratch / packages)]
    ran = run(*command, seconds=None, text="".join(f"{name}\n" for name in left))
    if ran.returncode != 0:
        told = (ran.stdout + ran.stderr).strip()[-800:]
        raise Failed(f"Python {release['python']} on this host can't compile the release: {told}")


def carry_over(others: list[Path], scratch: Path, sources: dict[str, str]) -> set[str]:
    """Takes what was compiled from the very same sources for other releases, and returns those sources.

    Most of a release is what the one before has, too, and compiling takes longer than all else. What is taken has the
    digest that it had when it was compiled, by a list that none but root could write; the release that is being replaced is
    no source, so what is unpacked again is compiled again. Python finds it by its own version in the name, and sets the path
    right itself.
    """
    carried: set[str] = set()
    for earlier in others:
        try:
            known, made = read_release(earlier)["files"], read_made(earlier)
            if made[BROUGHT] != digest_of_file(earlier / BROUGHT) or foreign_writer(
                list(release_files.entries(earlier))
            ):
                continue
        except (Unlisted, OSError):
            continue
        for compiled, digest in made["digests"].items():
            source = COMPILED.sub(r"\1.py", compiled)
            if source in carried or source not in sources or known.get(source) != sources[source]:
                continue
            try:
                content = (earlier / compiled).read_bytes()
            except OSError:
                continue
            if digest_of(content) == digest:
                path = scratch / compiled
                path.parent.mkdir(exist_ok=True)
                write(str(path), content)
                carried.add(source)
    return carried


def try_out(tree: Path) -> None:
    """A release that can't even be imported is refused while the old one goes on running. Nobody's rights suffice."""
    for name in ("nox_api", "nox_runner"):
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]
        ran = run(*command, str(tree / "venv/bin/python3"), "-I", "-m", name, "--version", seconds=None)
        if ran.returncode != 0:
            raise Failed(
                f"This release can't be loaded ({name}): {ran.stderr.strip()[-800:]}\n"
                "Nothing was switched; the running release goes on."
            )


def point(link: Path, target: str) -> None:
    """Makes link → target by one rename: whoever looks sees the old one or the new one."""
    temporary = link.with_name(f".{link.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def target_of(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def recovered_manifest(state: Path) -> list[dict[str, Any]]:
    """The activations as the host's record remembers them, for a manifest that was lost."""
    try:
        return whole_manifest(json.loads(state.read_text(encoding="utf-8"))["manifest"])
    except (OSError, ValueError, LookupError, TypeError):
        return []


def write_manifest(path: Path, entries: list[dict[str, Any]]) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    temporary.chmod(0o644)
    temporary.replace(path)


def is_private_to_root(path: Path) -> bool:
    """Whether root alone may change a file that all may read."""
    found = path.lstat()
    return (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (0, 0, 0o644)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def outcomes(entries: list[dict[str, Any]]) -> dict[str, bool]:
    """Release → whether it was healthy when it was last judged, the last one judged first."""
    found: dict[str, bool] = {}
    for entry in reversed(entries):
        if entry.get("healthy") or entry.get("failed"):
            found.setdefault(entry["release"], bool(entry.get("healthy")) and not entry.get("failed"))
    return found


def way_back(entries: list[dict[str, Any]], there: list[str], current: str, wanted: str) -> tuple[str, str]:
    """(release to go back to, why there is none). By the record, never by file times."""
    judged = outcomes(entries)
    good = [name for name, healthy in judged.items() if healthy and name in there]
    choice = ", ".join(name for name in good if name != current) or "none"
    if wanted:
        if wanted in good:
            return wanted, ""
        why = "is not on this host" if wanted not in there else "was never recorded as healthy"
        return "", f"{wanted} {why}. There are: {choice}"
    others = [name for name in good if name != current]
    return (others[0], "") if others else ("", "no other release on this host was recorded as healthy")


def prunable(entries: list[dict[str, Any]], there: list[str], current: str, keep: int) -> list[str]:
    """Releases to remove: by the order of the record the oldest activation first, but failed ones before all others."""
    order = list(dict.fromkeys(entry["release"] for entry in reversed(entries)))
    healthy = next((name for name, good in outcomes(entries).items() if good and name != current), "")
    spared = {current, healthy}
    ranked = [name for name in order if name in there] + [name for name in there if name not in order]
    judged = outcomes(entries)
    ranked.sort(key=lambda name: not judged.get(name, True))
    surplus = [name for name in ranked if name not in spared]
    return surplus[max(0, keep - len(spared & set(there))) :]


def kept(root: Path, record: dict[str, Any]) -> dict[str, str]:
    """The release that a repair is to keep: its id, and its archive's SHA-256, "" for an archive that is lost or isn't what its
    name says. Empty where another one has to be made: for another Python, or on a host of which nobody knows what it ran.

    What was switched to last counts, then what is on record, then the link: a way back that was not tested, or a playbook
    that was killed, left the record behind. Never one whose tests failed when they were last run.
    """
    activations = read_manifest(root / "manifest.json") or whole_manifest(record.get("manifest"))
    judged = outcomes(activations)
    names = [one["release"] for one in activations[-1:]] + [
        record.get("release"),
        Path(target_of(root / "current")).name,
    ]
    names = [name for name in dict.fromkeys(names) if name and judged.get(name, True)]
    archives, unpacked = root / "archives", root / "releases"
    there = [name for name in names if (unpacked / name).is_dir() or (archives / f"{name}.tar.gz").exists()]
    if not (there or names):
        return {}
    name = (there or names)[0]
    digest, target = archive_of(archives / f"{name}.tar.gz")
    if not digest.startswith(name.rpartition("-")[2]):
        digest, target = "", made_for(unpacked / name)
    return {"id": name, "sha256": digest} if target is None or runs_here(*target) else {}


def archive_of(path: Path) -> tuple[str, tuple[str, str] | None]:
    """An archive's SHA-256 and the (Python, machine) it was made for; ("", None) for what is none."""
    try:
        digest = digest_of_file(path)
        with tarfile.open(path) as tar:
            handle = tar.extractfile(BROUGHT)
            about = json.loads(handle.read() if handle else b"")
        return digest, (str(about["python"]), str(about["arch"]))
    except (OSError, tarfile.TarError, zlib.error, EOFError, ValueError, LookupError, TypeError):
        return "", None


def runs_here(python: str, arch: str) -> bool:
    """Whether this host has what a release was made for."""
    return os.access(f"/usr/bin/python{python}", os.X_OK) and arch == os.uname().machine


def made_for(directory: Path) -> tuple[str, str] | None:
    """The (Python, machine) of an unpacked release; None where its list can't be read."""
    try:
        about = read_release(directory)
    except Unlisted:
        return None
    return about["python"], about["arch"]


def judge(wanted: Wanted, entries: list[dict[str, Any]]) -> list[str]:
    """Records what came of the tests of the release that was switched to last."""
    last = entries[-1] if entries else None
    if last is None or last["release"] != wanted.id:
        if not wanted.check_mode:
            raise Failed(f"{wanted.root}/manifest.json: {wanted.id} is not the release switched to last")
    elif not last.get(wanted.state):
        last[wanted.state] = now()
        if not wanted.check_mode:
            write_manifest(wanted.root / "manifest.json", entries)
        return [f"record {wanted.id} as {wanted.state}"]
    return []


def go_back(wanted: Wanted, entries: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """Switches to a release that was healthy, after a look whether it still is whole."""
    root = wanted.root
    current = Path(target_of(root / "current")).name
    name, why = way_back(entries, complete_releases(root)[0], current, wanted.id)
    if not name:
        raise Failed(f"Can't go back: {why}.")
    directory = root / "releases" / name
    # One that was unpacked before such a list was made: what it brought must do, for staying with a failed one is worse.
    whole = (directory / MADE).exists()
    problem, loose = release_problem(directory) if whole else (brought_problem(directory), "")
    if problem or loose:
        raise Failed(f"Can't go back to {name}: {problem or f'others than root may change {loose}'}.")
    python = (directory / "venv/bin/python3").resolve()
    if not os.access(python, os.X_OK):
        raise Failed(f"Can't go back to {name}: it needs {python}, which isn't there any more.")
    if name == current and entries and entries[-1]["release"] == name:
        return name, []
    entries.append({"release": name, "since": now(), "healthy": ""})
    if not wanted.check_mode:
        point(root / "current", f"releases/{name}")
        write_manifest(root / "manifest.json", entries[-200:])
    return name, [f"switch back from {current or 'nothing'} to {name}"]


@contextmanager
def held(root: Path) -> Iterator[None]:
    """Waits for another one at work here, which a controller that was killed may have left."""
    if not root.is_dir():
        yield
        return
    descriptor = os.open(root, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for _ in range(600):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.2)
        else:
            raise Failed(
                f"Another run has been changing releases in {root} for two minutes: ps -ef | grep -E 'nox_release|nox-host-state'"
            )
        yield
    finally:
        os.close(descriptor)


def complete_releases(root: Path) -> tuple[list[str], list[str]]:
    """(releases, what runs that were killed have left)."""
    releases = root / "releases"
    there = sorted(path.name for path in releases.iterdir() if path.is_dir()) if releases.is_dir() else []
    # `.<id>.partial-…` and `.<id>.broken-…` are what a run that was killed has left
    return [one for one in there if not one.startswith(".")], [one for one in there if one.startswith(".")]


def make_current(wanted: Wanted, entries: list[dict[str, Any]], lost: bool) -> list[str]:
    """Unpacks what isn't there as it should be, switches, records the switch, removes what is too old."""
    root, name, dry = wanted.root, wanted.id, wanted.check_mode
    manifest, link, directory = root / "manifest.json", root / "current", root / "releases" / name
    # with the archive here already, nobody has looked at these
    actions = [f"take back {path}" for path in own_places(root, Path(wanted.archive), dry)]
    problem = "absent"
    if directory.is_dir():
        problem, loose = release_problem(directory)
        if loose:
            problem = f"others than root may change {loose}"
    if problem:
        actions.append(f"unpack {name}" + ("" if problem == "absent" else f" again: {problem}"))
        if not dry:
            unpack(root, Path(wanted.archive), wanted.sha256, directory)
    if target_of(link) != f"releases/{name}":
        actions.append(f"switch from {Path(target_of(link)).name or 'nothing'} to {name}")
        if not dry:
            point(link, f"releases/{name}")
    if target_of(root / ".venv") != "current/venv":
        actions.append(f"link {root}/.venv")
        if not dry:
            point(root / ".venv", "current/venv")
    if not entries or entries[-1]["release"] != name:
        actions.append("record the switch")
        entries.append({"release": name, "since": now(), "healthy": ""})
        if not dry:
            write_manifest(manifest, entries[-200:])
    elif lost or not is_private_to_root(manifest):
        actions.append(f"{'recover' if lost else 'take back'} {manifest}")
        if not dry:
            write_manifest(manifest, entries)
    complete, leftovers = complete_releases(root)
    for old in [*leftovers, *prunable(entries, complete, name, wanted.keep)]:
        actions.append(f"remove {old}")
        if not dry:
            shutil.rmtree(root / "releases" / old, ignore_errors=True)
    kept = {name, *complete_releases(root)[0]}
    for archive in sorted((root / "archives").glob("*.tar.gz")):
        if archive.name.removesuffix(".tar.gz") not in kept:
            actions.append(f"remove {archive}")
            if not dry:
                archive.unlink()
    return actions


def change(wanted: Wanted) -> dict[str, Any]:
    """What nox_release returns when it doesn't fail. Raises Failed."""
    manifest = wanted.root / "manifest.json"
    entries = read_manifest(manifest)
    lost = not entries
    if lost:
        entries = recovered_manifest(Path(wanted.record))
    previous = release = Path(target_of(wanted.root / "current")).name
    if wanted.state in ("healthy", "failed"):
        actions = judge(wanted, entries)
    elif wanted.state == "back":
        release, actions = go_back(wanted, entries)
    else:
        release, actions = wanted.id, make_current(wanted, entries, lost)
    return {
        "changed": bool(actions),
        "actions": actions,
        "previous": previous,
        "release": release,
        "proven": bool(entries) and entries[-1]["release"] == release and outcomes(entries[-1:]).get(release, False),
        "diff": {"before": "", "after": "".join(f"{action}\n" for action in actions)},
    }


def answer(options: dict[str, Any]) -> dict[str, Any]:
    """What nox_release returns; `options` are its own, checked, and check_mode."""
    wanted = Wanted(**{**options, "root": Path(options["root"])})
    os.umask(0o022)
    try:
        with held(wanted.root):
            return change(wanted)
    except Failed as why:
        return {"failed": True, "msg": str(why)}
