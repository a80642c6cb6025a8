#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Several files, directories and links at once: one round trip, where a loop takes two for each of them."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nox_files
short_description: Makes files, directories and links in one round trip
description:
  - What a role leaves on a host, in the order given. A file is written beside its place under its own name, checked
    there, and moved.
  - Check mode and diff are exact, on a host too that lacks the owners, or the program that checks.
  - Directories are changed through what was opened, never through a link that isn't root's. A user of the service can't lead it elsewhere.
author: The Nox maintainers
options:
  files:
    description: What there is to be.
    type: list
    elements: dict
    required: true
    suboptions:
      path:
        description:
          - Where; several paths get the same. A file's or a link's directory is there, or comes before it in the list; those
            above a directory are made, root's.
        type: list
        elements: path
        required: true
      state:
        description: What it is to be.
        type: str
        choices: [file, directory, link, absent]
        default: file
      content:
        description: The whole text of a file.
        type: str
        default: ""
      target:
        description: Where a link points to. It need not be there.
        type: str
      owner:
        description: Name of the owner.
        type: str
        default: root
      group:
        description: Name of the group.
        type: str
        default: root
      mode:
        description: Of a file or a directory, in octal. Without it C(0644) and C(0755).
        type: str
      validate:
        description: A command that ends with 0 if the new file, in place of C(%s), is good. Only asked about a file that differs.
        type: str
"""

EXAMPLES = r"""
- name: Make the log directory, and have it rotated
  nox.platform.nox_files:
    files:
      - {path: /var/log/nox-api, state: directory, owner: nox-api, group: adm, mode: "2750"}
      - path: /etc/logrotate.d/nox-api
        content: "{{ lookup('ansible.builtin.template', 'logrotate.j2') }}"
        validate: logrotate --debug %s
"""

RETURN = r"""
written:
  description: Paths that were changed (in check mode, would be).
  returned: always
  type: list
"""

import grp
import os
import pwd
import shlex
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

Diff = dict[str, str]


def wanted_ids(module: AnsibleModule, one: dict[str, Any]) -> tuple[int, int]:
    """(uid, gid); -1, which leaves it alone, for what a check on an untouched host can't know yet."""
    ids = []
    for kind, name, known in (("user", one["owner"], pwd.getpwnam), ("group", one["group"], grp.getgrnam)):
        try:
            ids.append(int(known(name)[2]))
        except KeyError:
            if not module.check_mode:
                module.fail_json(msg=f"{one['path']}: there is no {kind} {name} here")
            ids.append(-1)
    return ids[0], ids[1]


def lstat(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def attributes(status: os.stat_result) -> str:
    return f"owner {status.st_uid}:{status.st_gid} mode {stat.S_IMODE(status.st_mode):04o}"


def changed_attributes(path: str, found: os.stat_result, ids: tuple[int, int], mode: int) -> list[Diff]:
    """The difference, if there is one."""
    differs = [wanted not in (-1, had) for wanted, had in zip(ids, (found.st_uid, found.st_gid))]  # noqa: B905
    if not any(differs) and stat.S_IMODE(found.st_mode) == mode:
        return []
    after = f"owner {ids[0]}:{ids[1]} mode {mode:04o}\n"
    return [{"before_header": path, "after_header": path, "before": attributes(found) + "\n", "after": after}]


def make_directory(module: AnsibleModule, one: dict[str, Any]) -> list[Diff]:
    path, mode, ids = one["path"], int(one["mode"] or "0755", 8), wanted_ids(module, one)
    found = lstat(path)
    if found and stat.S_ISLNK(found.st_mode) and found.st_uid == 0:
        path = os.path.realpath(path)  # root's own choice: it lies on another disk
        found = lstat(path)
    if found and not stat.S_ISDIR(found.st_mode):
        module.fail_json(msg=f"{path} is to be a directory, and is something else. Look: ls -ld {path}")
    made: list[Diff] = []
    if not found:
        made = [{"before_header": path, "after_header": path, "before": "", "after": "a directory\n"}]
        if module.check_mode:
            return made
        Path(path).mkdir(mode=0o700, parents=True)
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW) if not module.check_mode else -1
    try:
        status = os.fstat(handle) if handle != -1 else os.lstat(path)
        differs = changed_attributes(path, status, ids, mode)
        if differs and handle != -1:
            os.fchown(handle, *ids)
            os.fchmod(handle, mode)
    finally:
        if handle != -1:
            os.close(handle)
    return made or differs


def write_file(module: AnsibleModule, one: dict[str, Any]) -> list[Diff]:
    path, mode, ids = one["path"], int(one["mode"] or "0644", 8), wanted_ids(module, one)
    content = one["content"].encode()
    found = lstat(path)
    if found and stat.S_ISDIR(found.st_mode):
        module.fail_json(msg=f"{path} is to be a file, and is a directory. Look: ls -la {path}")
    before = Path(path).read_bytes() if found and stat.S_ISREG(found.st_mode) else None
    if found and before == content:
        differs = changed_attributes(path, found, ids, mode)
        if differs and not module.check_mode:
            os.chown(path, *ids, follow_symlinks=False)
            Path(path).chmod(mode)
        return differs
    if not module.check_mode:
        replace(module, path, content, ids, mode, one["validate"])
    shown = (before or b"").decode("utf-8", "replace")
    return [{"before_header": path, "after_header": path, "before": shown, "after": one["content"]}]


def replace(
    module: AnsibleModule, path: str, content: bytes, ids: tuple[int, int], mode: int, validate: str | None
) -> None:
    place = Path(path)
    with tempfile.TemporaryDirectory(prefix=".nox-", dir=place.parent) as beside:
        new = Path(beside) / place.name  # a unit, for one, is checked by its name
        with new.open("wb") as handle:
            os.fchmod(handle.fileno(), 0o600)
            handle.write(content)
            handle.flush()
            os.fchown(handle.fileno(), *ids)
            os.fchmod(handle.fileno(), mode)
            os.fsync(handle.fileno())
        if validate:
            rc, out, err = module.run_command([word.replace("%s", str(new)) for word in shlex.split(validate)])
            if rc != 0:
                module.fail_json(msg=f"{path} was not written, its checker refuses it: {(out + err).strip()[-1500:]}")
        new.replace(place)


def make_link(module: AnsibleModule, one: dict[str, Any]) -> list[Diff]:
    path, target = one["path"], one["target"]
    if not target:
        module.fail_json(msg=f"{path} is to be a link: target is missing")
    found = lstat(path)
    if found and stat.S_ISDIR(found.st_mode):
        module.fail_json(msg=f"{path} is to be a link, and is a directory. Look: ls -la {path}")
    before = Path(path).readlink() if found and stat.S_ISLNK(found.st_mode) else None
    if before == Path(target):
        return []
    if not module.check_mode:
        temporary = f"{path}.new"
        Path(temporary).unlink(missing_ok=True)
        Path(temporary).symlink_to(target)
        Path(temporary).replace(path)
    shown = f"link to {before}\n" if before else ("a file\n" if found else "")
    return [{"before_header": path, "after_header": path, "before": shown, "after": f"link to {target}\n"}]


def take_away(module: AnsibleModule, one: dict[str, Any]) -> list[Diff]:
    path = one["path"]
    found = lstat(path)
    if not found:
        return []
    if not module.check_mode:
        if stat.S_ISDIR(found.st_mode):
            shutil.rmtree(path)
        else:
            Path(path).unlink()
    return [{"before_header": path, "after_header": path, "before": f"{attributes(found)}\n", "after": ""}]


STATES = {"file": write_file, "directory": make_directory, "link": make_link, "absent": take_away}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "files": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "path": {"type": "list", "elements": "path", "required": True},
                    "state": {"type": "str", "choices": list(STATES), "default": "file"},
                    "content": {"type": "str", "default": ""},
                    "target": {"type": "str"},
                    "owner": {"type": "str", "default": "root"},
                    "group": {"type": "str", "default": "root"},
                    "mode": {"type": "str"},
                    "validate": {"type": "str"},
                },
            }
        },
        supports_check_mode=True,
    )
    written: list[str] = []
    diffs: list[Diff] = []
    for one in [{**entry, "path": path} for entry in module.params["files"] for path in entry["path"]]:
        try:
            differs = STATES[one["state"]](module, one)
        except OSError as error:
            module.fail_json(msg=f"{one['path']}: {error.strerror or error}", written=written)
        diffs += differs
        written += [one["path"]] * bool(differs)
    module.exit_json(changed=bool(written), written=written, diff=diffs)


if __name__ == "__main__":
    os.umask(0o022)  # directories above one that is made must not inherit a hardened umask
    main()
