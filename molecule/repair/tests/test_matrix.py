"""Each damage: done, reported exactly, mended, and nothing of the operator's lost."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import INVENTORY, PAIRS, PROJECT, ROWS, SEED, Ran, play
from damages import DAMAGES, Damage

testinfra_hosts = [f"ansible://nox1?ansible_inventory={os.environ['NOX_INVENTORY']}"]

MARK = "a line that must survive every repair"
PUT_MARKS = (
    "echo kept > /home/nox/nox/sandbox/kept.txt && chown nox:nox /home/nox/nox/sandbox/kept.txt && "
    f"echo '{MARK}' >> /var/log/nox-api/nox-api.log"
)
# The sandbox that a damage has moved away is put back as its operator would.
EVIDENCE = (
    "test ! -e /root/sandbox-before || { mv /root/sandbox-before/* /home/nox/nox/sandbox/; rm -r /root/sandbox-before; }; "
    "sed -n 's/^NOX_API_TOKEN=//p' /etc/default/nox-api; cat /home/nox/nox/sandbox/kept.txt; "
    f"grep -cF '{MARK}' /var/log/nox-api/nox-api.log; true"
)
BROKEN: list[bool] = []  # not empty while a test is on its way, or has failed
# The damages that can't be told apart, or are no damage, once the other one is done.
TOO_LARGE = {"record deleted", "everything below /opt/nox deleted"}


def pairs() -> list[tuple[Damage, Damage]]:
    """Seeded pairs of damages that touch different things."""
    chooser = random.Random(SEED)
    some = [damage for damage in DAMAGES if damage.name not in TOO_LARGE]
    chosen: list[tuple[Damage, Damage]] = []
    while len(chosen) < PAIRS:
        first, second = chooser.sample(some, 2)
        things = [{finding.split()[1] for finding in one.findings} for one in (first, second)]
        # A lost settings file's token comes from the running front: docs/repair.md says so.
        unrecoverable = "settings deleted" in (first.name, second.name) and "nox-api.service" in things[0] | things[1]
        if not things[0] & things[1] and not unrecoverable:
            chosen.append((first, second))
    return chosen


@pytest.fixture(scope="module")
def names(host: Any) -> dict[str, str]:
    """What the damages' texts leave open, and the things that must survive, put in place."""
    host.check_output(PUT_MARKS)
    out = host.check_output("basename $(readlink /opt/nox/current); sed -n 's/^NOX_API_TOKEN=//p' /etc/default/nox-api")
    release, token = out.split()
    url = json.loads(host.check_output("cat /var/lib/nox/state.json"))["about"]["url"]
    return {"release": release, "token": token, "url": url.removeprefix("https://")}


def damage(host: Any, one: Damage, names: dict[str, str]) -> set[str]:
    """Does it; returns the findings that are to be expected."""
    lines = host.check_output("cat /etc/default/nox-api 2> /dev/null | wc -l")
    fill = {"release": names["release"], "url": names["url"], "line": str(int(lines) + 1)}
    done = host.run(one.command.replace("{{", "\0").replace("{release}", names["release"]).replace("\0", "{"))
    assert done.rc in (0, 1, 3), done.stderr
    return {finding.format(**fill) for finding in one.findings}


def proven(host: Any, scratch: Path, names: dict[str, str], logs: bool) -> Ran:
    """Repairs, and shows that all is well again. Returns the repair."""
    repaired = play("repair", scratch)
    assert repaired.status == 0, repaired.output[-3000:]
    assert repaired.report["state"] == "mended", repaired.report
    again = play("repair", scratch)
    assert (again.status, again.report["state"]) == (0, "clean"), again.output[-3000:]
    assert "changed=0" in again.output
    assert " ok=1 " in again.output, "a clean host costs one task"
    report = host.run("nox-debug --json")
    failed = [check for check in json.loads(report.stdout)["checks"] if check["state"] == "fail"]
    assert failed == []
    token, kept, marks = host.check_output(EVIDENCE).splitlines()
    assert token == names["token"], "the token survives"
    assert kept == "kept", "the sandbox survives"
    assert not logs or int(marks) > 0, "the logs survive"
    if int(marks) == 0:
        host.check_output(PUT_MARKS)  # gone with the damage itself
    return repaired


@pytest.fixture(autouse=True)
def sound(host: Any, names: dict[str, str]) -> Iterator[None]:
    """A test that failed leaves a damaged host: the next one is to find a sound one all the same."""
    if BROKEN:
        host.run("rm -f /var/lib/nox/state.json; rm -rf /root/sandbox-before; systemctl restart caddy")
        install = ["ansible-playbook", "-i", str(INVENTORY), str(PROJECT / "playbooks/install.yml")]
        subprocess.run(install, check=True, capture_output=True)
        host.check_output(PUT_MARKS)
        names["token"] = host.check_output("sed -n 's/^NOX_API_TOKEN=//p' /etc/default/nox-api")
    BROKEN[:] = [True]
    yield


@pytest.mark.parametrize("one", DAMAGES, ids=lambda one: one.name)
def test_damage(host: Any, names: dict[str, str], scratch: Path, one: Damage) -> None:
    expected = damage(host, one, names)
    drift = play("drift", scratch)
    assert drift.findings == expected
    assert (drift.status, drift.report["state"]) == (2, "drifted")
    repaired = proven(host, scratch, names, one.keeps_log)
    ROWS.append((one.name, " · ".join(sorted(drift.findings)), repaired.seconds))
    BROKEN.clear()


@pytest.mark.parametrize("both", pairs(), ids=lambda both: f"{both[0].name} + {both[1].name}")
def test_pair(host: Any, names: dict[str, str], scratch: Path, both: tuple[Damage, Damage]) -> None:
    for one in both:
        damage(host, one, names)
    repaired = proven(host, scratch, names, all(one.keeps_log for one in both))
    ROWS.append((f"{both[0].name} + {both[1].name}", f"{len(repaired.findings)} findings", repaired.seconds))
    BROKEN.clear()


def test_the_operators_other_sites_are_left_alone(host: Any, scratch: Path) -> None:
    """A proxy that can't load because of somebody else's site: said, not touched."""
    site = "/etc/caddy/sites-enabled/blog.caddy"
    host.check_output(f"printf 'blog.example {{\\n  nonsense\\n}}\\n' > {site}")
    try:
        repaired = play("repair", scratch)
        assert repaired.status == 2
        assert repaired.findings == {f"proxy.others {site}"}
        assert host.check_output(f"sed -n 2p {site}") == "  nonsense"
    finally:
        host.check_output(f"rm {site}")
    assert play("repair", scratch).report["state"] == "clean"
    BROKEN.clear()
