"""The seccomp profile of the runner's container is what runs may call, and what building a sandbox takes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILDING = {"mount", "mount_setattr", "pivot_root", "sethostname", "umount2", "unshare"}


def test_the_profile_follows_the_runners_own_filter():
    spec = importlib.util.spec_from_file_location("seccomp", ROOT / "app/nox_runner/seccomp.py")
    seccomp = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seccomp)
    profile = json.loads((ROOT / "container/seccomp.json").read_text())
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    (allowed,) = [rule for rule in profile["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW"]
    assert set(allowed["names"]) == {*seccomp._NAMES.split(), *seccomp._CONDITIONAL, *BUILDING}
