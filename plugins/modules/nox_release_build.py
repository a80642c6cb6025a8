#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Builds a release of the service on the control side: one file with everything a target's Python needs."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nox_release_build
short_description: Builds one release archive for one Python on the control side
description:
  - Puts the service's source and its locked, hash-checked dependencies for the target's Python and architecture into
    one archive. Nothing is compiled, and no code of a dependency runs; only wheels are taken.
  - The same inputs give the same bytes. The archive's SHA-256 names the release, so a host can check what it got.
  - Runs where ansible-playbook runs (C(delegate_to=localhost)). Its only effect is a file in the cache, check mode
    included, since the rest of a check needs to know the release's name.
author: The Nox maintainers
options:
  source:
    description: The tree with C(app/) and C(requirements/). Needed unless O(bundle) is given.
    type: path
  bundle:
    description:
      - A file made by M(nox.platform.nox_bundle). The release is taken out of it instead of being built, so that no
        package index is needed.
    type: path
  python:
    description: The target's Python, for example V(3.10).
    type: str
    required: true
  arch:
    description: The target's machine, as C(uname -m) says it.
    type: str
    choices: [x86_64, aarch64]
    required: true
  cache:
    description: Directory on the control side that keeps built archives.
    type: path
    required: true
"""

EXAMPLES = r"""
- name: Build for Ubuntu 22.04
  nox.platform.nox_release_build:
    source: "{{ playbook_dir }}/.."
    python: "3.10"
    arch: x86_64
    cache: ~/.cache/nox/releases
  delegate_to: localhost
"""

RETURN = r"""
release:
  description: The built release.
  returned: always
  type: dict
  sample:
    id: 0.1.0-3f9d2c1ab04e
    version: 0.1.0
    python: "3.10"
    arch: x86_64
    archive: /root/.cache/nox/releases/0.1.0-3f9d2c1ab04e.tar.gz
    sha256: 3f9d2c1ab04e...
    bytes: 9000000
"""

import csv
import gzip
import hashlib
import io
import json
import re
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nox.platform.plugins.module_utils.bundle_file import read_contents
from ansible_collections.nox.platform.plugins.module_utils.digests import digest_of, digest_of_file

FORMAT = "2"  # part of the inputs' digest: raise it when this builder lays files out differently
PACKAGES = ("nox_api", "nox_runner")
# glibc of the supported targets: 2.35 (Ubuntu 22.04) and newer
GLIBC = ("2_35", "2_34", "2_31", "2_28", "2_27", "2_26", "2_24", "2_17", "2_12", "2_5")

PIP_SCRIPT = """\
#!/opt/nox/.venv/bin/python3
import sys

from pip._internal.cli.main import main

sys.exit(main())
"""


def project_version(source: Path) -> str:
    text = (source / "app/pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r'(?m)^version\s*=\s*"([0-9][^"]*)"', text)
    if not match:
        raise ValueError(f"{source}/app/pyproject.toml: no version")
    return match.group(1)


def source_files(source: Path) -> list[Path]:
    return sorted(
        path
        for package in PACKAGES
        for path in (source / "app" / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )


def inputs_digest(source: Path, lock: Path, python: str, arch: str) -> str:
    """SHA-256 over all that decides what comes out."""
    found = hashlib.sha256(f"{FORMAT}\0{python}\0{arch}\0".encode())
    for path in [source / "app/pyproject.toml", lock, *source_files(source)]:
        found.update(f"{path.relative_to(source)}\0".encode())
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def pip_install(module: AnsibleModule, lock: Path, target: Path, python: str, arch: str) -> None:
    abi = f"cp{python.replace('.', '')}"
    platforms = [f"manylinux_{glibc}_{arch}" for glibc in GLIBC] + [f"manylinux2014_{arch}"]
    # --no-deps: the lock is complete, and markers would be judged by the wrong (our own) interpreter
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    command += ["--require-hashes", "--only-binary=:all:", "--implementation=cp"]
    command += [f"--python-version={python}", f"--target={target}", f"--requirement={lock}"]
    command += [f"--abi={name}" for name in (abi, "abi3", "none")]
    command += [f"--platform={name}" for name in platforms]
    rc, out, err = module.run_command(command)
    if rc != 0:
        module.fail_json(
            msg=f"pip can't fetch the release's dependencies for Python {python} on {arch}:\n{(err or out).strip()[-1500:]}\n"
            "The control side needs a package index (pip's own configuration is used): "
            f"{sys.executable} -m pip download --no-deps --only-binary=:all: fastapi"
        )
    leave_out_traces(target)


def leave_out_traces(target: Path) -> None:
    """Takes away what tells of this side, such as start scripts, which begin with the path of its Python; also their digests, which
    the packages' lists have."""
    shutil.rmtree(target / "bin", ignore_errors=True)
    for source in target.glob("*.dist-info/direct_url.json"):
        source.unlink()
    for record in target.glob("*.dist-info/RECORD"):
        lines = record.read_text(encoding="utf-8").splitlines(keepends=True)
        names = (name for name, *_ in csv.reader(lines))
        kept = [line for line, name in zip(lines, names, strict=True) if (target / name).exists()]
        record.write_text("".join(kept), encoding="utf-8")


def add_packages(module: AnsibleModule, lock: Path, target: Path, python: str, arch: str) -> None:
    """The locked dependencies, fetched once per lock: another version of the service seldom has others."""
    cache = Path(module.params["cache"])
    key = hashlib.sha256(f"{FORMAT}\0{python}\0{arch}\0".encode() + lock.read_bytes()).hexdigest()
    kept, digest = cache / f"packages-{key}.tar.gz", cache / f"packages-{key}.sha256"
    try:
        data = kept.read_bytes()
        usable = digest_of(data) == digest.read_text(encoding="ascii")
    except OSError:
        usable = False
    if usable:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            tar.extractall(target)  # noqa: S202  written below, by ourselves
        return
    pip_install(module, lock, target, python, arch)
    data = pack(target)
    write(kept, data)
    write(digest, digest_of(data).encode())


def add_project(source: Path, target: Path, version: str) -> None:
    """The service itself: its packages, and the metadata that makes `pip list` name it."""
    for path in source_files(source):
        place = target / path.relative_to(source / "app")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    info = target / f"nox-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: nox\nVersion: {version}\n", encoding="utf-8")
    (info / "INSTALLER").write_text("nox\n", encoding="utf-8")


def lay_out(tree: Path, python: str) -> None:
    """A virtual environment without anything of this machine: the target's own interpreter, by links."""
    binary = tree / "venv/bin"
    binary.mkdir(parents=True, exist_ok=True)
    (binary / "python3").symlink_to(f"/usr/bin/python{python}")
    (binary / "python").symlink_to("python3")
    (binary / f"python{python}").symlink_to("python3")
    (binary / "pip").write_text(PIP_SCRIPT, encoding="utf-8")
    (tree / "venv/pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {python}\n", encoding="utf-8"
    )


def describe(tree: Path) -> dict[str, str]:
    """Path → SHA-256 of a file, or "-> target" of a link."""
    found = {}
    for path in sorted(tree.rglob("*")):
        name = str(path.relative_to(tree))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = digest_of_file(path)
    return found


def pack(tree: Path) -> bytes:
    """A tar whose bytes depend on the contents alone."""
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=6, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        for path in sorted(tree.rglob("*")):
            entry = tar.gettarinfo(path, str(path.relative_to(tree)))
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = "root"
            entry.mtime = 0
            entry.mode = 0o755 if entry.isdir() or path.parent.name == "bin" else 0o644
            if entry.isreg():
                with path.open("rb") as handle:
                    tar.addfile(entry, handle)
            else:
                tar.addfile(entry)
    return buffer.getvalue()


def build(module: AnsibleModule, source: Path, lock: Path, python: str, arch: str, inputs: str) -> dict[str, Any]:
    cache = Path(module.params["cache"])
    version = project_version(source)
    with tempfile.TemporaryDirectory(prefix="nox-build-") as scratch:
        tree = Path(scratch) / "release"
        packages = tree / f"venv/lib/python{python}/site-packages"
        packages.mkdir(parents=True)
        add_packages(module, lock, packages, python, arch)
        add_project(source, packages, version)
        lay_out(tree, python)
        about = {"name": "nox", "version": version, "python": python, "arch": arch, "inputs": inputs}
        text = json.dumps({**about, "files": describe(tree)}, indent=1, sort_keys=True)
        (tree / "RELEASE.json").write_text(text + "\n", encoding="utf-8")
        data = pack(tree)
    digest = digest_of(data)
    name = f"{version}-{digest[:12]}"
    archive = cache / f"{name}.tar.gz"
    write(archive, data)
    return {
        "id": name,
        "version": version,
        "python": python,
        "arch": arch,
        "archive": str(archive),
        "sha256": digest,
        "bytes": len(data),
    }


def from_bundle(module: AnsibleModule, bundle: Path, cache: Path, python: str, arch: str) -> dict[str, Any]:
    """The bundle's release for one target, as a file in the cache; its digest is checked."""
    try:
        with tarfile.open(bundle, mode="r:") as tar:
            contents = read_contents(tar)
            there = [one for one in contents["releases"] if (one["python"], one["arch"]) == (python, arch)]
            if not there:
                known = ", ".join(f"{one['python']} {one['arch']}" for one in contents["releases"])
                module.fail_json(msg=f"{bundle} has no release for Python {python} on {arch}; it has: {known}")
            release: dict[str, Any] = there[0]
            archive = cache / f"{release['id']}.tar.gz"
            if not archive.is_file() or digest_of_file(archive) != release["sha256"]:
                handle = tar.extractfile(f"releases/{release['id']}.tar.gz")
                data = handle.read() if handle else b""
                if digest_of(data) != release["sha256"]:
                    module.fail_json(msg=f"{bundle}: releases/{release['id']}.tar.gz is damaged; get the bundle again")
                write(archive, data)
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        module.fail_json(msg=f"{bundle} is no bundle (noxctl bundle makes them): {error}")
    return {**release, "archive": str(archive)}


def write(path: Path, data: bytes) -> None:
    """Whole or not at all: two playbooks may build at once."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as handle:
        handle.write(data)
    Path(handle.name).replace(path)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "source": {"type": "path"},
            "bundle": {"type": "path"},
            "python": {"type": "str", "required": True},
            "arch": {"type": "str", "choices": ["x86_64", "aarch64"], "required": True},
            "cache": {"type": "path", "required": True},
        },
        required_one_of=[("source", "bundle")],
        supports_check_mode=True,
    )
    python, arch = module.params["python"], module.params["arch"]
    if module.params["bundle"]:
        cache = Path(module.params["cache"])
        cache.mkdir(parents=True, exist_ok=True)
        release = from_bundle(module, Path(module.params["bundle"]), cache, python, arch)
        module.exit_json(changed=False, built=False, release=release)
    source = Path(module.params["source"]).resolve()
    lock = source / f"requirements/app-py{python}.lock"
    if not lock.is_file():
        known = sorted(path.stem[6:] for path in lock.parent.glob("app-py*.lock"))
        module.fail_json(msg=f"No lock for Python {python}; there are: {', '.join(known) or 'none'} (make lock)")
    cache = Path(module.params["cache"])
    cache.mkdir(parents=True, exist_ok=True)
    inputs = inputs_digest(source, lock, python, arch)
    known_path = cache / f"{inputs}.json"
    try:
        release = json.loads(known_path.read_text(encoding="utf-8"))
        usable = digest_of_file(Path(release["archive"])) == release["sha256"]
    except (OSError, ValueError, KeyError):
        usable = False
    if not usable:
        release = build(module, source, lock, python, arch, inputs)
        write(known_path, json.dumps(release, indent=1).encode())
    # A file in the control side's cache changes no host: never "changed".
    module.exit_json(changed=False, built=not usable, release=release)


if __name__ == "__main__":
    main()
