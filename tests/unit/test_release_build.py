"""What a release is made of is the same, wherever it was made."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, NoReturn

from ansible_collections.nox.platform.plugins.modules import nox_release_build


class Module:
    """As much of AnsibleModule as pip_install takes."""

    def run_command(self, command: list[str]) -> tuple[int, str, str]:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    def fail_json(self, msg: str) -> NoReturn:
        raise AssertionError(msg)


def wheel_with_a_script(place: Path) -> Path:
    wheel, info = place / "tiny-1-py3-none-any.whl", "tiny-1.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny.py", "def main(): ...\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/entry_points.txt", "[console_scripts]\ntiny = tiny:main\n")
        archive.writestr(f"{info}/RECORD", "tiny.py,,\n")
    return wheel


def test_nothing_of_this_sides_python_is_in_a_release(tmp_path: Path) -> None:
    wheel, lock, target = wheel_with_a_script(tmp_path), tmp_path / "lock", tmp_path / "packages"
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    lock.write_text(f"tiny @ {wheel.as_uri()} --hash=sha256:{digest}\n")
    module: Any = Module()
    nox_release_build.pip_install(module, lock, target, "3.10", "x86_64")
    files = {str(path.relative_to(target)): path for path in target.rglob("*") if path.is_file()}
    assert "tiny.py" in files
    assert not any(sys.executable.encode() in path.read_bytes() for path in files.values())
    # a script's digest would tell of its first line, which names that Python
    listed = {line.partition(",")[0] for line in files["tiny-1.dist-info/RECORD"].read_text().splitlines()}
    assert "tiny.py" in listed
    assert listed <= files.keys()
