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
  - C(manifest.json) remembers which release ran from when, and whether it was seen healthy. Pruning goes by that
    record, never by file times, and spares the current and the last healthy release.
author: The Nox maintainers
options:
  id:
    description: The release, C(<version>-<digest>).
    type: str
    required: true
  sha256:
    description: The archive's SHA-256. Needed unless O(state=healthy).
    type: str
  archive:
    description: The archive on the host. Needed unless O(state=healthy).
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
    description: V(current) unpacks and switches; V(healthy) records that the current release passed its tests.
    type: str
    choices: [current, healthy]
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
previous:
  description: The release that was current before, empty where there was none.
  returned: always
  type: str
actions:
  description: What was done (in check mode, would be done), in order.
  returned: always
  type: list
"""

import hashlib
import json
import os
import shutil
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nox.platform.plugins.module_utils.release_files import (
    foreign_writer,
    read_manifest,
    release_problem,
    whole_manifest,
)


def unpack(module: AnsibleModule, archive: Path, sha256: str, directory: Path) -> None:
    """Archive → directory, by a rename when all of it is there and checked."""
    try:
        data_digest = hashlib.sha256(archive.read_bytes()).hexdigest()
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
            tar.extractall(scratch)  # noqa: S202  members checked above
        problem = release_problem(scratch)
        if problem:
            module.fail_json(msg=f"{archive}: {problem}")
        about = json.loads((scratch / "RELEASE.json").read_text(encoding="utf-8"))
        # Compiled here, once: the services can't write below /opt, and would compile at every start.
        packages = scratch / f"venv/lib/python{about['python']}/site-packages"
        rc, _, err = module.run_command(
            [str(scratch / "venv/bin/python3"), "-I", "-m", "compileall", "-q", "-j", "0"]
            + ["--invalidation-mode", "unchecked-hash", "-s", str(scratch), "-p", str(directory), str(packages)]
        )
        if rc != 0:
            module.fail_json(
                msg=f"Python {about['python']} on this host can't compile the release: {err.strip()[-800:]}"
            )
        if directory.exists():
            aside = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}.broken-"))
            directory.rename(aside / "old")
            scratch.rename(directory)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            scratch.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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


def prunable(entries: list[dict[str, Any]], there: list[str], current: str, keep: int) -> list[str]:
    """Releases to remove, by the order of the record: oldest activation first."""
    order = list(dict.fromkeys(entry["release"] for entry in reversed(entries)))
    healthy = next((e["release"] for e in reversed(entries) if e.get("healthy") and e["release"] != current), "")
    spared = {current, healthy}
    ranked = [name for name in order if name in there] + [name for name in there if name not in order]
    surplus = [name for name in ranked if name not in spared]
    return surplus[max(0, keep - len(spared & set(there))) :]


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "id": {"type": "str", "required": True},
            "sha256": {"type": "str"},
            "archive": {"type": "path"},
            "root": {"type": "path", "default": "/opt/nox"},
            "keep": {"type": "int", "default": 3},
            "record": {"type": "path", "default": "/var/lib/nox/state.json"},
            "state": {"type": "str", "choices": ["current", "healthy"], "default": "current"},
        },
        required_if=[("state", "current", ["sha256", "archive"])],
        supports_check_mode=True,
    )
    root, name = Path(module.params["root"]), module.params["id"]
    manifest = root / "manifest.json"
    entries = read_manifest(manifest)
    lost = not entries
    if lost:
        entries = recovered_manifest(Path(module.params["record"]))
    link = root / "current"
    previous = Path(target_of(link)).name
    actions: list[str] = []

    if module.params["state"] == "healthy":
        last = entries[-1] if entries else None
        if last is None or last["release"] != name:
            if not module.check_mode:
                module.fail_json(msg=f"{manifest}: {name} is not the release switched to last")
        elif not last.get("healthy"):
            actions.append(f"record {name} as healthy")
            last["healthy"] = now()
            if not module.check_mode:
                write_manifest(manifest, entries)
        module.exit_json(changed=bool(actions), actions=actions, previous=previous)

    directory = root / "releases" / name
    problem = "absent"
    if directory.is_dir():
        problem = release_problem(directory)
        loose = "" if problem else foreign_writer(directory)
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

    releases = root / "releases"
    there = sorted(path.name for path in releases.iterdir() if path.is_dir()) if releases.is_dir() else []
    complete = [one for one in there if not one.startswith(".")]
    # `.<id>.partial-…` and `.<id>.broken-…` are what a run that was killed has left
    leftovers = [one for one in there if one.startswith(".")]
    for old in [*leftovers, *prunable(entries, complete, name, module.params["keep"])]:
        actions.append(f"remove {old}")
        if not module.check_mode:
            shutil.rmtree(releases / old, ignore_errors=True)
            (root / f"archives/{old}.tar.gz").unlink(missing_ok=True)
    module.exit_json(
        changed=bool(actions),
        actions=actions,
        previous=previous,
        diff={"before": "", "after": "".join(f"{action}\n" for action in actions)},
    )


if __name__ == "__main__":
    os.umask(0o022)
    main()
