#!/usr/bin/python
# SPDX-License-Identifier: Apache-2.0
"""Packs releases, the collection and a list of parts into one file."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nox_bundle
short_description: One file with all that a rollout needs
description:
  - Packs the releases for each target Python, the collection's archive and an SBOM (CycloneDX, JSON) into one file.
    Whoever has it needs no package index to install. The same contents give the same bytes.
  - Runs where ansible-playbook runs, and needs the package cyclonedx-python-lib there.
author: The Nox maintainers
requirements:
  - cyclonedx-python-lib
options:
  releases:
    description: What M(nox.platform.nox_release_build) returned for each target.
    type: list
    elements: dict
    required: true
  collection:
    description: The collection's archive, as C(ansible-galaxy collection build) made it.
    type: path
  out:
    description: The file to write.
    type: path
    required: true
"""

EXAMPLES = r"""
- name: Pack
  nox.platform.nox_bundle:
    releases: "{{ built.results | map(attribute='release') }}"
    out: nox.bundle
"""

RETURN = r"""
bundle:
  description: What was written.
  returned: always
  type: dict
  sample: {path: nox.bundle, sha256: 3f9d2c1ab04e..., bytes: 36000000, version: 0.1.0, releases: [0.1.0-3f9d2c1ab04e]}
"""

import email
import email.message
import gzip
import io
import json
import tarfile
import tempfile
import uuid
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.nox.platform.plugins.module_utils.bundle_file import CONTENTS, FORMAT
from ansible_collections.nox.platform.plugins.module_utils.digests import digest_of, digest_of_file

EPOCH = datetime(1980, 1, 1, tzinfo=timezone.utc)  # a date of the build would make two builds differ
NAMESPACE = uuid.UUID("9d3f8f0e-7f0d-4bb6-9d0b-4e6f1c0a51b7")  # of our serial numbers; any fixed one will do


def metadata_of(archive: Path) -> list[email.message.Message]:
    """The METADATA of every distribution in a release."""
    found = []
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.endswith(".dist-info/METADATA"):
                handle = tar.extractfile(member)
                found.append(email.message_from_bytes(handle.read() if handle else b""))
    return found


def sbom(version: str, releases: list[dict[str, Any]]) -> bytes:
    """CycloneDX JSON: every distribution of every release, once, with the releases it is in."""
    # Here, because only the control side has it; ansible-doc and the hosts must be able to read this file without.
    from cyclonedx.model import Property  # noqa: PLC0415
    from cyclonedx.model.bom import Bom, BomMetaData  # noqa: PLC0415
    from cyclonedx.model.component import Component, ComponentType  # noqa: PLC0415
    from cyclonedx.model.license import DisjunctiveLicense  # noqa: PLC0415
    from cyclonedx.output.json import JsonV1Dot5  # noqa: PLC0415
    from packageurl import PackageURL  # noqa: PLC0415

    parts: dict[str, Component] = {}
    for release in releases:
        for metadata in metadata_of(Path(release["archive"])):
            name, number = str(metadata["Name"]), str(metadata["Version"])
            if name == "nox":
                continue
            reference = f"{name.lower()}=={number}"
            part = parts.setdefault(
                reference,
                Component(
                    name=name,
                    version=number,
                    type=ComponentType.LIBRARY,
                    bom_ref=reference,
                    purl=PackageURL("pypi", None, name.lower().replace("_", "-"), number),
                    description=str(metadata["Summary"] or "") or None,
                ),
            )
            licence = str(metadata["License-Expression"] or metadata["License"] or "").strip().splitlines()
            if licence:
                part.licenses.add(DisjunctiveLicense(name=licence[0]))
            part.properties.add(Property(name="nox:release", value=release["id"]))
    product = Component(name="nox", version=version, type=ComponentType.APPLICATION, bom_ref=f"nox=={version}")
    seed = "\0".join(sorted(release["sha256"] for release in releases))
    bom = Bom(
        components=parts.values(),
        metadata=BomMetaData(component=product, timestamp=EPOCH),
        serial_number=uuid.uuid5(NAMESPACE, seed),
    )
    bom.register_dependency(product, parts.values())
    return JsonV1Dot5(bom).output_as_string(indent=1).encode()


def entries_of(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {
            member.name: handle.read()
            for member in tar
            if member.isreg() and (handle := tar.extractfile(member)) is not None
        }


def normalised(archive: bytes) -> bytes:
    """A collection's archive without the build's times and the file system's order, which its own lists also have."""
    entries = entries_of(archive)
    files = json.loads(entries["FILES.json"])
    files["files"].sort(key=lambda one: one["name"])
    entries["FILES.json"] = json.dumps(files, indent=1).encode()
    manifest = json.loads(entries["MANIFEST.json"])
    manifest["file_manifest_file"]["chksum_sha256"] = digest_of(entries["FILES.json"])
    entries["MANIFEST.json"] = json.dumps(manifest, indent=1).encode()
    # a start script stays one
    executable = {name for name, data in entries.items() if data.startswith(b"#!")}
    # MANIFEST.json first: ansible-galaxy looks for it there
    ordered = {name: entries[name] for name in sorted(entries, key=lambda n: (n != "MANIFEST.json", n))}
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=6, mtime=0) as zipped:
        zipped.write(tarred(ordered, executable))
    return buffer.getvalue()


def tarred(entries: dict[str, bytes], executable: set[str] = frozenset()) -> bytes:  # type: ignore[assignment]
    """Name → bytes as an uncompressed tar whose bytes depend on these alone."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in entries.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o755 if name in executable else 0o644
            entry.uname = entry.gname = "root"
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "releases": {"type": "list", "elements": "dict", "required": True},
            "collection": {"type": "path"},
            "out": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    releases, out = module.params["releases"], Path(module.params["out"])
    versions = sorted({release["version"] for release in releases})
    if len(versions) != 1:
        module.fail_json(msg=f"One version is needed, got: {', '.join(versions) or 'no release'}")
    try:
        parts = sbom(versions[0], releases)
    except ImportError as error:
        module.fail_json(msg=f"{error.name} is missing on the control side: pip install cyclonedx-python-lib")
    listed = [
        {key: one[key] for key in ("id", "version", "python", "arch", "sha256", "bytes")}
        for one in sorted(releases, key=lambda one: (one["arch"], [int(part) for part in one["python"].split(".")]))
    ]
    contents = {"format": FORMAT, "name": "nox", "version": versions[0], "releases": listed}
    entries = {}
    if module.params["collection"]:
        archive = normalised(Path(module.params["collection"]).read_bytes())
        name = f"collection/{Path(module.params['collection']).name}"
        contents["collection"] = {"file": name, "sha256": digest_of(archive)}
        entries[name] = archive
    contents["sbom"] = {"file": "sbom.json", "sha256": digest_of(parts)}
    by_id = {release["id"]: release for release in releases}
    data = tarred(
        {
            CONTENTS: json.dumps(contents, indent=1).encode() + b"\n",
            "sbom.json": parts,
            **entries,
            **{f"releases/{one['id']}.tar.gz": Path(by_id[one["id"]]["archive"]).read_bytes() for one in listed},
        }
    )
    digest = digest_of(data)
    changed = not out.is_file() or digest_of_file(out) != digest
    if changed and not module.check_mode:
        if not out.parent.is_dir():
            module.fail_json(msg=f"{out.parent}: no such directory")
        with tempfile.NamedTemporaryFile(dir=out.parent, delete=False) as handle:
            handle.write(data)
        Path(handle.name).chmod(0o644)
        Path(handle.name).replace(out)
    module.exit_json(
        changed=changed,
        bundle={
            "path": str(out),
            "sha256": digest,
            "bytes": len(data),
            "version": versions[0],
            "releases": [one["id"] for one in listed],
        },
    )


if __name__ == "__main__":
    main()
