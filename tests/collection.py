"""The collection archive alone is enough: built here, installed into an empty folder, used from there on a lab host.

    python -m tests.collection

The folder has a Python environment of its own with ansible-core and pip, nothing else: what the roles need beside those
must be in the archive. Exit codes: 0 passed, 1 failed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tests.on_hosts import BIN, ROOT, lab, run

LAB = "collection"
# Whatever else lies in a checkout (tests, labs, inventories, vaults, caches) has no business in the archive.
BELONGS = re.compile(
    r"(?:MANIFEST\.json|FILES\.json|README\.md|CHANGELOG\.md|LICENSE|requirements\.yml"
    r"|meta/runtime\.yml|(?:roles|plugins|playbooks)/.+|docs/.+\.(?:md|svg)"
    r"|app/pyproject\.toml|app/nox_(?:api|runner)/.+\.py|requirements/app[^/]*\.(?:in|lock)|tests/[a-z_]+\.sh"
    r"|inventory/(?:example|local)/.+|Dockerfile|container/.+)"
)
NEVER = re.compile(r"(?:^|/)(?:\.|__pycache__)|\.(?:pyc|key|pem|retry)$|vault\.yml$")


def check_contents(archive: Path) -> None:
    with tarfile.open(archive) as tar:
        names = [entry.name for entry in tar if entry.isfile()]
        links = [entry.name for entry in tar if entry.issym() or entry.islnk()]
    wrong = [name for name in names if not BELONGS.fullmatch(name) or NEVER.search(name)] + links
    if wrong:
        sys.exit(f"{archive.name} holds what doesn't belong there: {' '.join(sorted(wrong))}")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:  # a source archive has no history to ask
        strangers = set(names) - set(tracked.stdout.splitlines()) - {"MANIFEST.json", "FILES.json"}
        if strangers:
            sys.exit(f"{archive.name} holds files that are not in the repository: {' '.join(sorted(strangers))}")
    print(f"{archive.name}: {len(names)} files, {archive.stat().st_size} bytes")


def main() -> None:
    # Nothing of ours is in reach: no configuration, no module path, no collections of this user, no built release.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "PYTHON", "NOX_"))}
    with tempfile.TemporaryDirectory(prefix="nox-collection-") as place:
        folder = Path(place)
        clean |= {
            "ANSIBLE_HOME": str(folder / ".ansible"),
            "ANSIBLE_COLLECTIONS_PATH": str(folder / "collections"),
            "XDG_CACHE_HOME": str(folder / ".cache"),
            "ANSIBLE_NOCOLOR": "1",
        }
        build = BIN / "ansible-galaxy"
        run(build, "collection", "build", "--output-path", folder, cwd=ROOT, environment=clean)
        (archive,) = folder.glob("nox-platform-*.tar.gz")
        check_contents(archive)
        run(sys.executable, "-m", "venv", ".venv", cwd=folder, environment=clean)
        lock = (
            "--constraint",
            ROOT / "requirements/control.lock",
        )  # versions and hashes; nothing of it but what is asked
        # With the machine's certificates, as pip does it: by itself uv trusts only those it brings.
        uv = (BIN / "uv", "pip", "install", "--quiet", "--system-certs", "--python", folder / ".venv/bin/python")
        run(*uv, *lock, "ansible-core", cwd=folder, environment=clean)
        galaxy = (".venv/bin/ansible-galaxy", "collection", "install", "--offline", archive.name, "-p", "collections")
        run(*galaxy, cwd=folder, environment=clean)
        with lab(LAB, folder / "inventory", "nox1"):
            play = (".venv/bin/ansible-playbook", "-i", "inventory")
            run(*play, "nox.platform.install", cwd=folder, environment=clean)
            again = run(*play, "nox.platform.install", cwd=folder, environment=clean)
            if not re.search(r"(?m)^nox1 .*\bchanged=0 .*\bfailed=0 ", again):
                sys.exit("the second run changed something")
            run(*play, "nox.platform.drift", cwd=folder, environment=clean)


if __name__ == "__main__":
    main()
