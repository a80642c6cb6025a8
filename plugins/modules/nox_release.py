#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Releases on a host: checked, unpacked beside each other, switched by one rename, remembered."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nox_release
short_description: Unpacks a release and makes it the current one
description:
  - Unpacks an archive made by M(nox.platform.nox_release_build) to C(releases/<id>), after its SHA-256 has been
    checked, and lets C(current) point to it by one atomic rename. No network, no pip, no compiler.
  - A release that is there already is checked file by file against its own list, and unpacked anew when it differs.
  - C(manifest.json) remembers which release ran from when, and whether it was seen healthy or failed. Pruning and
    rolling back go by that record, never by file times; the current and the last healthy release are spared.
author: The Nox maintainers
options:
  id:
    description:
      - The release, C(<version>-<digest>). With O(state=back) it may be left out, which means the last other release
        that was recorded as healthy and is still there.
    type: str
    default: ""
  sha256:
    description: The archive's SHA-256. Needed with O(state=current).
    type: str
  archive:
    description: The archive on the host. Needed with O(state=current).
    type: path
  root:
    description: The directory that holds releases, archives and links.
    type: path
    default: /opt/nox
  keep:
    description: How many releases stay, the current one included.
    type: int
    default: 3
  record:
    description: Where M(nox.platform.nox_state) keeps its record; a lost manifest is made again from it.
    type: path
    default: /var/lib/nox/state.json
  state:
    description:
      - V(current) unpacks, tries whether the new code can be loaded at all, and switches. V(healthy) and V(failed)
        record what came of the tests of the release that was switched to last. V(back) switches to a release recorded
        as healthy.
    type: str
    choices: [current, healthy, failed, back]
    default: current
"""

EXAMPLES = r"""
- name: Run this release
  nox.platform.nox_release:
    id: 0.1.0-3f9d2c1ab04e
    sha256: 3f9d2c1ab04e...
    archive: /opt/nox/archives/0.1.0-3f9d2c1ab04e.tar.gz
"""

RETURN = r"""
release:
  description: The release that is current now (in check mode, would be).
  returned: always
  type: str
previous:
  description: The release that was current before, empty where there was none.
  returned: always
  type: str
proven:
  description: Whether it was recorded as healthy since it was switched to; if not, what runs may still be the one before.
  returned: always
  type: bool
actions:
  description: What was done (in check mode, would be done), in order.
  returned: always
  type: list
"""

import fcntl
import json
import os
import shutil
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nox.platform.plugins.module_utils.digests import digest_of_file
from ansible_collections.nox.platform.plugins.module_utils.release_files import (
    MADE,
    Unlisted,
    brought_problem,
    read_manifest,
    read_release,
    release_problem,
    whole_manifest,
    write_made,
)


def unpack(module: AnsibleModule, archive: Path, sha256: str, directory: Path) -> None:
    """Archive → directory, by a rename when all of it is there and checked."""
    try:
        data_digest = digest_of_file(archive)
    except OSError as error:
        module.fail_json(msg=f"{archive}: {error.strerror}")
    if data_digest != sha256:
        module.fail_json(msg=f"{archive}: SHA-256 is {data_digest}, should be {sha256}. Delete it and run again.")
    directory.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}.partial-"))
    try:
        scratch.chmod(0o755)
        with tarfile.open(archive) as tar:
            for member in tar:
                # the digest vouches for the contents; this is for the day somebody signs a wrong one
                if (
                    member.name.startswith("/")
                    or ".." in Path(member.name).parts
                    or not (member.isreg() or member.isdir() or member.issym())
                ):
                    module.fail_json(msg=f"{archive}: refuses to unpack {member.name!r}")
                tar.extract(member, scratch)  # at once: a second pass would decompress all of it again
        try:
            python = read_release(scratch)["python"]
        except Unlisted as problem:
            module.fail_json(msg=f"{archive}: {problem}")
        packages = scratch / f"venv/lib/python{python}/site-packages"
        with ThreadPoolExecutor() as beside:  # what is compiled lies beside what is compared
            wrong = beside.submit(brought_problem, scratch)
            # Compiled here, once: the services can't write below /opt, and would compile at every start.
            rc, _, err = module.run_command(
                [str(scratch / "venv/bin/python3"), "-I", "-m", "compileall", "-q", "-j", "0"]
                + ["-x", r"/site-packages/pip/", "--invalidation-mode", "unchecked-hash"]  # no service imports pip
                + ["-s", str(scratch), "-p", str(directory), str(packages)]
            )
        if wrong.result():
            module.fail_json(msg=f"{archive}: {wrong.result()}")
        if rc != 0:
            module.fail_json(msg=f"Python {python} on this host can't compile the release: {err.strip()[-800:]}")
        write_made(scratch)
        try_out(module, scratch)
        if directory.exists():
            aside = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}.broken-"))
            directory.rename(aside / "old")
            scratch.rename(directory)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            scratch.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def try_out(module: AnsibleModule, tree: Path) -> None:
    """A release that can't even be imported is refused while the old one goes on running. Nobody's rights suffice."""
    for name in ("nox_api", "nox_runner"):
        command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]
        command += [str(tree / "venv/bin/python3"), "-I", "-m", name, "--version"]
        rc, _, err = module.run_command(command)
        if rc != 0:
            module.fail_json(
                msg=f"This release can't be loaded ({name}): {err.strip()[-800:]}\nNothing was switched; the running release goes on."
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


def judge(module: AnsibleModule, root: Path, entries: list[dict[str, Any]]) -> list[str]:
    """Records what came of the tests of the release that was switched to last."""
    name, state = module.params["id"], module.params["state"]
    last = entries[-1] if entries else None
    if last is None or last["release"] != name:
        if not module.check_mode:
            module.fail_json(msg=f"{root}/manifest.json: {name} is not the release switched to last")
    elif not last.get(state):
        last[state] = now()
        if not module.check_mode:
            write_manifest(root / "manifest.json", entries)
        return [f"record {name} as {state}"]
    return []


def go_back(
    module: AnsibleModule, root: Path, entries: list[dict[str, Any]], there: list[str]
) -> tuple[str, list[str]]:
    """Switches to a release that was healthy, after a look whether it still is whole."""
    current = Path(target_of(root / "current")).name
    name, why = way_back(entries, there, current, module.params["id"])
    if not name:
        module.fail_json(msg=f"Can't go back: {why}.")
    directory = root / "releases" / name
    # One that was unpacked before such a list was made: what it brought must do, for staying with a failed one is worse.
    whole = (directory / MADE).exists()
    problem, loose = release_problem(directory) if whole else (brought_problem(directory), "")
    if problem or loose:
        module.fail_json(msg=f"Can't go back to {name}: {problem or f'others than root may change {loose}'}.")
    python = (directory / "venv/bin/python3").resolve()
    if not os.access(python, os.X_OK):
        module.fail_json(msg=f"Can't go back to {name}: it needs {python}, which isn't there any more.")
    if name == current and entries and entries[-1]["release"] == name:
        return name, []
    entries.append({"release": name, "since": now(), "healthy": ""})
    if not module.check_mode:
        point(root / "current", f"releases/{name}")
        write_manifest(root / "manifest.json", entries[-200:])
    return name, [f"switch back from {current or 'nothing'} to {name}"]


def hold(module: AnsibleModule, root: Path) -> None:
    """Waits for another one at work here, which a controller that was killed may have left; held until this ends."""
    if not root.is_dir():
        return
    descriptor = os.open(root, os.O_RDONLY | os.O_CLOEXEC)  # closed by the end of the process
    for _ in range(600):
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.2)
    module.fail_json(msg=f"Another run has been changing releases in {root} for two minutes: ps -ef | grep nox_release")


def complete_releases(root: Path) -> tuple[list[str], list[str]]:
    """(releases, what runs that were killed have left)."""
    releases = root / "releases"
    there = sorted(path.name for path in releases.iterdir() if path.is_dir()) if releases.is_dir() else []
    # `.<id>.partial-…` and `.<id>.broken-…` are what a run that was killed has left
    return [one for one in there if not one.startswith(".")], [one for one in there if one.startswith(".")]


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "id": {"type": "str", "default": ""},
            "sha256": {"type": "str"},
            "archive": {"type": "path"},
            "root": {"type": "path", "default": "/opt/nox"},
            "keep": {"type": "int", "default": 3},
            "record": {"type": "path", "default": "/var/lib/nox/state.json"},
            "state": {"type": "str", "choices": ["current", "healthy", "failed", "back"], "default": "current"},
        },
        required_if=[
            ("state", "current", ["id", "sha256", "archive"]),
            ("state", "healthy", ["id"]),
            ("state", "failed", ["id"]),
        ],
        supports_check_mode=True,
    )
    root, name = Path(module.params["root"]), module.params["id"]
    hold(module, root)
    manifest = root / "manifest.json"
    entries = read_manifest(manifest)
    lost = not entries
    if lost:
        entries = recovered_manifest(Path(module.params["record"]))
    link = root / "current"
    previous = Path(target_of(link)).name
    actions: list[str] = []

    def leave(release: str) -> None:
        module.exit_json(
            changed=bool(actions),
            actions=actions,
            previous=previous,
            release=release,
            proven=bool(entries) and entries[-1]["release"] == release and outcomes(entries[-1:]).get(release, False),
            diff={"before": "", "after": "".join(f"{action}\n" for action in actions)},
        )

    if module.params["state"] in ("healthy", "failed"):
        actions += judge(module, root, entries)
        leave(previous)
    if module.params["state"] == "back":
        name, actions = go_back(module, root, entries, complete_releases(root)[0])
        leave(name)

    directory = root / "releases" / name
    problem = "absent"
    if directory.is_dir():
        problem, loose = release_problem(directory)
        if loose:
            problem = f"others than root may change {loose}"
    if problem:
        actions.append(f"unpack {name}" + ("" if problem == "absent" else f" again: {problem}"))
        if not module.check_mode:
            unpack(module, Path(module.params["archive"]), module.params["sha256"], directory)
    if target_of(link) != f"releases/{name}":
        actions.append(f"switch from {previous or 'nothing'} to {name}")
        if not module.check_mode:
            point(link, f"releases/{name}")
    if target_of(root / ".venv") != "current/venv":
        actions.append(f"link {root}/.venv")
        if not module.check_mode:
            point(root / ".venv", "current/venv")
    if not entries or entries[-1]["release"] != name:
        actions.append("record the switch")
        entries.append({"release": name, "since": now(), "healthy": ""})
        if not module.check_mode:
            write_manifest(manifest, entries[-200:])

    elif lost or not is_private_to_root(manifest):
        actions.append(f"{'recover' if lost else 'take back'} {manifest}")
        if not module.check_mode:
            write_manifest(manifest, entries)

    complete, leftovers = complete_releases(root)
    for old in [*leftovers, *prunable(entries, complete, name, module.params["keep"])]:
        actions.append(f"remove {old}")
        if not module.check_mode:
            shutil.rmtree(root / "releases" / old, ignore_errors=True)
    kept = {name, *complete_releases(root)[0]}
    for archive in sorted((root / "archives").glob("*.tar.gz")):
        if archive.name.removesuffix(".tar.gz") not in kept:
            actions.append(f"remove {archive}")
            if not module.check_mode:
                archive.unlink()
    leave(name)


if __name__ == "__main__":
    os.umask(0o022)
    main()
