"""The seccomp profile of the runner's container is what runs may call, and what building a sandbox takes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILDING = {"mount", "mount_setattr", "pivot_root", "sethostname", "umount2", "unshare"}


def test_the_profile_follows_the_runners_own_filter(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "app")
    seccomp = importlib.import_module("nox_runner.seccomp")
    profile = json.loads((ROOT / "container/seccomp.json").read_text())
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    pids, allowed = [rule for rule in profile["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW"]
    kernel = importlib.import_module("nox_runner.zygote.kernel")
    wanted = {"index": 1, "value": kernel.CLONE_NEWPID, "op": "SCMP_CMP_EQ"}
    assert (pids["names"], pids["args"]) == (["setns"], [wanted])
    assert set(allowed["names"]) == {*seccomp._NAMES.split(), *seccomp._CONDITIONAL, *BUILDING}
