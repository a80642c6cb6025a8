#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""One archive with all that makes a host's Nox this one, and the way back from it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nox_backup
short_description: Packs an installation into one checked archive, and unpacks it
description:
  - V(made) packs the settings with the token, the records, the current release, the sandbox's files and the history of
    runs. Users' files are read by their own user, never by root, so no link that a run plants leads anywhere.
  - V(opened) checks every part of an archive against its list and puts settings and records in place, for the roles to go
    on. V(filled) brings back the users' files, again as their own users.
author: The Nox maintainers
options:
  state:
    description: What to do.
    type: str
    choices: [made, opened, filled]
    required: true
  path:
    description: The archive on the host, with V(made) written with mode 0600.
    type: path
    required: true
  owner:
    description: Who may read an archive that was made; the ssh user, who fetches it.
    type: str
    default: root
  directory:
    description: A private directory for the parts, with V(opened) and V(filled).
    type: path
"""

EXAMPLES = r"""
- name: Pack
  nox.platform.nox_backup:
    state: made
    path: /var/tmp/nox/backup.tar.gz
"""

RETURN = r"""
manifest:
  description: What is in the archive.
  returned: always
  type: dict
skipped:
  description: What could not be read or written, as tar says it.
  returned: always
  type: list
"""

import json
import os
import platform
import pwd
import shutil
import stat
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nox.platform.plugins.module_utils.digests import digest_of_file
from ansible_collections.nox.platform.plugins.module_utils.release_files import Unlisted, read_release
from ansible_collections.nox.platform.plugins.module_utils.settings_file import (
    parse_settings,
    token_state,
    write_private,
)

FORMAT = 1
ROOT = Path("/opt/nox")
CONFIG = Path("/etc/default/nox-api")
STATE = Path("/var/lib/nox")
HISTORY = Path("/var/lib/nox-api/history")
# Part → where it belongs. Trees are packed and unpacked by their own user.
FILES = {
    "settings": CONFIG,
    "settings-record.json": STATE / "settings.json",
    "state.json": STATE / "state.json",
    "releases.json": ROOT / "manifest.json",
}
NEEDED = {"settings", "settings-record.json", "releases.json", "release.tar.gz", "sandbox.tar"}


def as_user(user: str, *command: str) -> list[str]:
    entry = pwd.getpwnam(user)
    return ["setpriv", f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups", *command]


def trees(settings: dict[str, str]) -> dict[str, tuple[str, Path, list[str]]]:
    """Part → (user, directory, what of it). The top of the history is root's, and made by an install."""
    sandbox = Path(settings.get("NOX_SANDBOX") or "/home/nox/nox/sandbox")
    return {"sandbox.tar": ("nox", sandbox, ["."]), "history.tar": ("nox-api", HISTORY, ["objects", "refs"])}


def tar(module: AnsibleModule, command: list[str]) -> list[str]:
    """Runs tar; what it couldn't read is told, not fatal: users may have files that even they can't read."""
    rc, _, err = module.run_command(command)
    if rc not in (0, 1):
        module.fail_json(msg=f"tar: {err.strip()[-800:]}")
    return [line for line in err.splitlines() if line.strip()][:20]


def make(module: AnsibleModule, path: Path) -> tuple[dict[str, Any], list[str]]:
    release = Path(os.readlink(ROOT / "current")).name
    archive = ROOT / f"archives/{release}.tar.gz"
    settings = parse_settings(CONFIG.read_text(encoding="utf-8", errors="replace"))
    skipped: list[str] = []
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="parts-") as scratch:
        sources = {name: source for name, source in FILES.items() if source.exists()}
        sources["release.tar.gz"] = archive
        for name, (user, directory, members) in trees(settings).items():
            if not directory.is_dir():
                continue
            part = Path(scratch) / name
            part.touch(mode=0o600)
            words = as_user(
                user, "tar", "--create", "--format=posix", "--ignore-failed-read", f"--directory={directory}", *members
            )
            # tar writes to what root opened for it: the user can't open files here
            skipped += tar(module, ["sh", "-c", 'out=$1; shift; exec "$@" > "$out"', "sh", str(part), *words])
            sources[name] = part
        try:
            about = read_release(ROOT / "current")
        except Unlisted as problem:
            module.fail_json(msg=f"{ROOT}/current: {problem}. Mend it first: playbooks/repair.yml")
        manifest = {
            "format": FORMAT,
            "host": platform.node(),
            "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "release": {
                "id": release,
                "sha256": digest_of_file(archive),
                "python": about["python"],
                "arch": about["arch"],
            },
            "parts": {
                name: {"sha256": digest_of_file(source), "bytes": source.stat().st_size}
                for name, source in sources.items()
            },
        }
        text = Path(scratch) / "manifest.json"
        text.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as handle:
            with tarfile.open(fileobj=handle, mode="w:gz", compresslevel=1) as whole:
                for name, source in {"manifest.json": text, **sources}.items():
                    entry = whole.gettarinfo(source, name)
                    entry.uid = entry.gid = 0
                    entry.uname = entry.gname = "root"
                    entry.mode = stat.S_IRUSR | stat.S_IWUSR
                    with source.open("rb") as part_file:
                        whole.addfile(entry, part_file)
            os.fchown(handle.fileno(), pwd.getpwnam(module.params["owner"]).pw_uid, -1)
    return manifest, skipped


def read_parts(module: AnsibleModule, path: Path, directory: Path) -> dict[str, Any]:
    """Unpacks into a private directory and checks every part against the list."""
    try:
        with tarfile.open(path, "r:gz") as whole:
            for member in whole:
                if not member.isreg() or member.name not in {*FILES, *NEEDED, "history.tar", "manifest.json"}:
                    module.fail_json(msg=f"{path}: holds {member.name!r}, which is no part of a backup of Nox")
                source = whole.extractfile(member)
                descriptor = os.open(directory / member.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "wb") as handle:
                    shutil.copyfileobj(source, handle, 1 << 20)  # type: ignore[arg-type]
        manifest: dict[str, Any] = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        parts = manifest["parts"]
        if manifest["format"] != FORMAT:
            module.fail_json(msg=f"{path}: format {manifest['format']}, this toolkit reads {FORMAT}")
        missing = sorted(NEEDED - set(parts))
        wrong = [name for name, entry in parts.items() if digest_of_file(directory / name) != entry["sha256"]]
    except (OSError, EOFError, ValueError, KeyError, tarfile.TarError) as error:
        module.fail_json(msg=f"{path} is damaged or no backup of Nox: {error}")
    if missing or wrong:
        module.fail_json(msg=f"{path} is damaged: {', '.join([*missing, *wrong])}")
    return manifest


def open_backup(module: AnsibleModule, path: Path, directory: Path) -> dict[str, Any]:
    manifest = read_parts(module, path, directory)
    settings = parse_settings((directory / "settings").read_text(encoding="utf-8", errors="replace"))
    if token_state(settings.get("NOX_API_TOKEN")) != "ok":
        module.fail_json(msg=f"{path}: its settings have no usable token")
    for name in ("settings", "settings-record.json"):
        write_private(FILES[name], (directory / name).read_text(encoding="utf-8", errors="surrogateescape"))
    ROOT.mkdir(mode=0o755, exist_ok=True)
    entries = FILES["releases.json"]
    shutil.copyfile(directory / "releases.json", entries)
    entries.chmod(0o644)
    return manifest


def fill(module: AnsibleModule, directory: Path) -> list[str]:
    settings = parse_settings(CONFIG.read_text(encoding="utf-8", errors="replace"))
    skipped = []
    for name, (user, target, _) in trees(settings).items():
        part = directory / name
        if not part.exists():
            continue
        words = as_user(user, "tar", "--extract", "--preserve-permissions", f"--directory={target}")
        skipped += tar(module, ["sh", "-c", 'in=$1; shift; exec "$@" < "$in"', "sh", str(part), *words])
    return skipped


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["made", "opened", "filled"], "required": True},
            "path": {"type": "path", "required": True},
            "owner": {"type": "str", "default": "root"},
            "directory": {"type": "path"},
        },
        required_if=[("state", "opened", ["directory"]), ("state", "filled", ["directory"])],
        supports_check_mode=True,
    )
    path, state = Path(module.params["path"]), module.params["state"]
    if module.check_mode:
        module.exit_json(changed=True, manifest={}, skipped=[])
    manifest: dict[str, Any] = {}
    skipped: list[str] = []
    try:
        if state == "made":
            manifest, skipped = make(module, path)
        elif state == "opened":
            manifest = open_backup(module, path, Path(module.params["directory"]))
        else:
            skipped = fill(module, Path(module.params["directory"]))
    except (OSError, KeyError) as error:
        module.fail_json(msg=f"Nox isn't whole on this host: {error}. playbooks/repair.yml first.")
    module.exit_json(changed=True, manifest=manifest, skipped=skipped)


if __name__ == "__main__":
    os.umask(0o022)
    main()
