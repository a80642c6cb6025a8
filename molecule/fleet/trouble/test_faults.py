"""What can go wrong, one thing at a time, and how every host must be afterwards. On the first four hosts.

Not to be had on these hosts: another clock. They have this machine's, and may not set it (systemd-nspawn); so the clock that
is a day off is the controller's.
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPSConnection
from pathlib import Path
from ssl import create_default_context

import pytest
import yaml
from rollouts import (
    BUNDLES,
    HOSTS,
    INVENTORY,
    STATE,
    Started,
    bundle,
    cable,
    check,
    current,
    journal_states,
    machine,
    noxctl,
    on,
    power_off,
    power_on,
    remember,
    rollout,
    seen,
    serving,
    states,
    unplugged,
    when,
)

from lab.machine import need_tools
from lab.state import LabError
from plugins.module_utils.bundle_file import read_contents

A, B, C, D = FOUR = HOSTS[:4]
LIMIT = ("--limit", ",".join(FOUR))
QUICK = (*LIMIT, "--soak", "0", "-e", "nox_smoke_stable_seconds=1")


@dataclass(frozen=True)
class Pair:
    """Two good releases: the one that all hosts run when a test begins, and the other one."""

    old: str
    new: str

    def all_old(self) -> dict[str, str]:
        return dict.fromkeys(FOUR, self.old)

    def all_new(self) -> dict[str, str]:
        return dict.fromkeys(FOUR, self.new)


@pytest.fixture
def pair() -> Pair:
    """Every test begins with one of them everywhere, proven, and all hosts behind the edge."""
    there = {proven(host) for host in FOUR}
    if len(there) != 1 or there - {"0.2.0", "0.8.0"} or drained():
        # a canary of all: what the last test left is mended at once
        code, _ = rollout("0.2.0", "--soak", "0", "-e", "nox_smoke_stable_seconds=1", "--canary", "100%")
        assert code == 0
        there = {"0.2.0"}
    (old,) = there
    return Pair(old, "0.8.0" if old == "0.2.0" else "0.2.0")


def proven(host: str) -> str:
    """The version a host runs, by its own record; empty where nobody has tested it."""
    entry = json.loads(seen(host, "/opt/nox/manifest.json").read_text())[-1]
    good = entry["healthy"] and not entry.get("failed") and entry["release"] == current(host)
    return str(entry["release"]).partition("-")[0] if good else ""


def drained() -> list[str]:
    return list(json.loads(seen("edge1", "/var/lib/nox-edge.json").read_text())["drained"])


def stopped_at_the_canary(code: int, found: dict[str, str], *, state: str, exit_code: int = 5) -> None:
    assert code == exit_code
    assert found == {A: state, B: "waiting", C: "waiting", D: "waiting"}


# ── Bad bundles


@pytest.mark.fault("release that refuses the settings", "exit 5 after the canary, which is back on the old one")
def test_a_release_that_refuses_the_settings(pair: Pair) -> None:
    code, result = rollout("0.7.0", *QUICK)
    stopped_at_the_canary(code, states(result), state="failed")
    error = result["hosts"][0]["error"]
    # the reason in the journal's words, at once
    assert "NOX_REGION is not set" in error and "journal's last lines" in error
    check(pair.all_old())


@pytest.mark.fault("release that is slow", "exit 5 after the canary, taken back by the gate")
def test_a_slow_release(pair: Pair) -> None:
    code, result = rollout("0.6.0", *QUICK)
    stopped_at_the_canary(code, states(result), state="rolled back")
    assert "a small run takes" in result["hosts"][0]["error"]
    check(pair.all_old())


@pytest.mark.fault("damaged bundle", "exit 2, nothing touched")
def test_a_damaged_bundle(pair: Pair, tmp_path: Path) -> None:
    data = bytearray(bundle(pair.new).read_bytes())
    data[len(data) // 2] ^= 1
    damaged = tmp_path / "damaged.bundle"
    damaged.write_bytes(data)
    done = noxctl("rollout", str(damaged), "--yes", *QUICK)
    remember(done.returncode)
    assert done.returncode == 2 and "damaged" in done.stderr
    check(pair.all_old())


# ── Hosts that are lost


@pytest.mark.fault("canary unreachable before", "exit 6, nothing touched")
def test_the_canary_is_unreachable_before(pair: Pair) -> None:
    with unplugged(A):
        code, result = rollout(pair.new, *QUICK)
    stopped_at_the_canary(code, states(result), state="unreachable", exit_code=6)
    check(pair.all_old(), out=(A,))


@pytest.mark.fault("host of wave 1 unreachable before", "exit 6, wave 2 untouched (serial: ran all of it)")
def test_no_wave_begins_after_one_with_an_unreachable_host(pair: Pair) -> None:
    with unplugged(B):
        code, result = rollout(pair.new, *QUICK, "--waves", "1,1,100%")
    assert code == 6
    assert states(result) == {A: "done", B: "unreachable", C: "waiting", D: "waiting"}
    check(pair.all_old() | {A: pair.new}, out=(B,))


@pytest.mark.fault("ssh drops in the middle of the copy", "exit 6, nothing switched; later it goes on and is done")
def test_ssh_drops_while_the_bundle_is_copied(pair: Pair) -> None:
    release = f".{release_in(pair.new)}.tar.gz.part"
    archives = seen(A, "/opt/nox/archives")
    for path in archives.glob(f"*{pair.new}-*"):
        path.unlink()
    slow = shlex.split(f"tc qdisc add dev {cable(A)} root tbf rate 20mbit burst 64kb latency 400ms")
    subprocess.run(slow, check=True)
    try:
        with unplugged(A, at_once=False) as cut:
            running = Started(pair.new, *QUICK)
            running.until("canary: upgrade")
            when(lambda: (archives / release).exists() and (archives / release).stat().st_size)
            cut()
            code = running.end()
    finally:
        subprocess.run(["tc", "qdisc", "del", "dev", cable(A), "root"], check=True)
    stopped_at_the_canary(code, journal_states(), state="unreachable", exit_code=6)
    check(pair.all_old(), out=(A,))
    kept = (archives / release).stat()
    assert kept.st_size > 0
    code, result = rollout(pair.new, *QUICK, "--resume")
    assert code == 0 and set(states(result).values()) == {"done"}
    assert not (archives / release).exists()
    check(pair.all_new())


@pytest.mark.fault("canary lost between switch and restart", "exit 6; found out and restarted by --resume")
def test_a_host_is_lost_during_its_upgrade(pair: Pair) -> None:
    with unplugged(A, at_once=False) as cut:
        running = Started(pair.new, *QUICK)
        running.until("canary: upgrade")
        when(lambda: current(A).startswith(pair.new))
        cut()
        code = running.end()
    stopped_at_the_canary(code, journal_states(), state="unreachable", exit_code=6)
    assert A not in serving()
    code, result = rollout(pair.new, *QUICK, "--resume")
    assert code == 0 and set(states(result).values()) == {"done"}
    check(pair.all_new())


@pytest.mark.fault("canary lost after its upgrade", "exit 6, out of the edge, others untouched; --resume ends it")
def test_a_host_is_lost_after_its_upgrade(pair: Pair) -> None:
    with unplugged(A, at_once=False) as cut:
        running = Started(pair.new, *LIMIT, "--soak", "5", "-e", "nox_smoke_stable_seconds=1")
        running.until("s of soak")
        cut()
        code = running.end()
    stopped_at_the_canary(code, journal_states(), state="unreachable", exit_code=6)
    check(pair.all_old() | {A: pair.new}, out=(A,))
    code, result = rollout(pair.new, *QUICK, "--resume")
    assert code == 0 and set(states(result).values()) == {"done"}
    check(pair.all_new())


@pytest.mark.fault(
    "host loses power while it serves", "what it was running is lost, and only that; the edge leaves it out"
)
def test_a_serving_host_loses_power(pair: Pair, token: str) -> None:
    trust = create_default_context(cafile=INVENTORY / ".ca/edge1.edge.crt")

    def ask() -> int:
        connection = HTTPSConnection(machine("edge1").address, context=trust, timeout=90)
        connection.request("GET", "/files", headers={"Authorization": f"Bearer {token}"})
        return connection.getresponse().status

    power_off(D)
    try:
        # What D was answering when it went is lost: nobody repeats a run. As soon as the edge has noticed, nothing is.
        lost = f'"HTTP request failed","host":"{machine(D).address}'
        when(lambda: lost in on("edge1", "journalctl --no-pager -q -u caddy.service -n 50"))
        found = [ask() for _ in range(40)]
    finally:
        power_on()
    when(lambda: on(D, "systemctl is-active nox-api.service caddy.service").split() == ["active"] * 2)
    assert found == [200] * 40
    check(pair.all_old())


# ── Hosts that can't


@pytest.mark.fault("full disk on one host of two", "exit 5: that one failed, unchanged; the other done; rest untouched")
def test_a_full_disk_on_one_host(pair: Pair) -> None:
    for path in seen(B, "/opt/nox/archives").glob(f"*{pair.new}-*"):
        path.unlink()
    on(B, "mount -t tmpfs -o size=1M,mode=755 tmpfs /opt/nox/archives")
    try:
        code, result = rollout(pair.new, *QUICK, "--waves", "1,2,100%")
    finally:
        on(B, "umount /opt/nox/archives")
    # a healthy host isn't rolled back because another one of its wave is (any_errors_fatal with a rescue did that)
    assert code == 5 and states(result) == {A: "done", B: "failed", C: "done", D: "waiting"}
    assert "space" in next(one["error"] for one in result["hosts"] if one["host"] == B)
    check({A: pair.new, B: pair.old, C: pair.new, D: pair.old})


@pytest.mark.fault("apt broken on the canary", "exit 0: a rollout needs no package")
def test_apt_is_broken(pair: Pair) -> None:
    on(A, "echo 'deb [' > /etc/apt/sources.list.d/broken.list; apt-get update")
    try:
        code, result = rollout(pair.new, *QUICK)
    finally:
        on(A, "rm /etc/apt/sources.list.d/broken.list")
    assert code == 0 and set(states(result).values()) == {"done"}
    check(pair.all_new())


def repaired(host: str, version: str) -> None:
    """A repair tests what the way back couldn't, and changes no version, whatever this checkout's is."""
    assert noxctl("repair", "--limit", host, "--yes").returncode == 0
    check({host: version}, out=(host,))


@pytest.mark.fault(
    "proxy down on the canary", "exit 5, canary out of the edge, on the old one and untested; repair tests it"
)
def test_the_proxy_is_down(pair: Pair) -> None:
    on(A, "systemctl stop caddy.service")
    try:
        code, result = rollout(pair.new, *QUICK)
        stopped_at_the_canary(code, states(result), state="failed")
        assert current(A).startswith(pair.old) and A not in serving()
    finally:
        on(A, "systemctl start caddy.service")
    check(pair.all_old(), out=(A,), unproven=(A,))
    repaired(A, pair.old)


@pytest.mark.fault(
    "host of the last wave fails, --on-failure rollback-all", "exit 5, all on the old release; repair tests the one"
)
def test_all_go_back(pair: Pair) -> None:
    on(D, "systemctl stop caddy.service")
    try:
        code, result = rollout(pair.new, *QUICK, "--waves", "1,2,100%", "--on-failure", "rollback-all")
    finally:
        on(D, "systemctl start caddy.service")
    assert code == 5 and states(result) == {A: "rolled back", B: "rolled back", C: "rolled back", D: "failed"}
    check(pair.all_old(), out=(D,), unproven=(D,))
    repaired(D, pair.old)


@pytest.mark.fault("edge unreachable", "exit 6, nothing touched")
def test_the_edge_is_lost(pair: Pair) -> None:
    with unplugged("edge1"):
        code, result = rollout(pair.new, *QUICK)
    assert code == 6 and set(states(result).values()) == {"waiting"} and "edge" in result["reason"]
    check(pair.all_old())


# ── The controller


def release_in(version: str) -> str:
    """The id of the release in a bundle."""
    with tarfile.open(bundle(version)) as tar:
        return str(read_contents(tar)["releases"][0]["id"])


@pytest.mark.fault(
    "controller killed in each phase, one after the other", "--resume each time; exit 0, no request lost"
)
def test_the_controller_is_killed_in_each_phase(pair: Pair, load: None) -> None:
    releases = seen(A, "/opt/nox/releases")
    on(A, f"rm -rf /opt/nox/releases/{pair.new}-*")  # or there would be nothing to unpack

    def unpacking() -> bool:
        return any(releases.glob(f".{pair.new}-*.partial-*"))

    phases: list[tuple[str, Callable[[], object]]] = [
        ("Look at the fleet", lambda: True),
        ("canary: out of the edge", lambda: True),
        ("canary: upgrade", unpacking),
        ("canary: upgrade", lambda: current(A).startswith(pair.new)),
        ("canary: back behind the edge", lambda: True),
        ("s of soak", lambda: True),
        ("canary: gate", lambda: True),
        ("wave 1: out of the edge", lambda: True),
        ("wave 1: upgrade", lambda: current(B).startswith(pair.new)),
    ]
    for number, (line, condition) in enumerate(phases):
        words = ("--soak", "2", *LIMIT, "-e", "nox_smoke_stable_seconds=1", "--waves", "1,1,100%")
        running = Started(pair.new, *words, *(("--resume",) if number else ()))
        running.until(line)
        when(condition)
        running.kill()
    code, result = rollout(pair.new, *QUICK, "--resume")
    assert code == 0 and set(states(result).values()) <= {"done", "already"}
    check(pair.all_new())
    # proven once, not done again
    entries = [entry["release"] for entry in json.loads(seen(A, "/opt/nox/manifest.json").read_text())]
    assert entries[-1].startswith(pair.new) and entries[-2].startswith(pair.old)


@pytest.mark.fault("controller killed on a bad release's way back", "--resume: exit 5, the canary on the old release")
def test_the_controller_is_killed_on_the_way_back(pair: Pair) -> None:
    running = Started("0.6.0", *QUICK)
    running.until("back to what was healthy (")
    when(lambda: current(A).startswith(pair.old))
    running.kill()
    code, result = rollout("0.6.0", *QUICK, "--resume")
    stopped_at_the_canary(code, states(result), state="rolled back")
    check(pair.all_old())


@pytest.mark.fault("paused by Ctrl-C, then goes on", "exit 1 after the canary; --resume: exit 0")
def test_it_pauses(pair: Pair) -> None:
    running = Started(pair.new, *QUICK)
    running.until("canary: upgrade")
    running.process.send_signal(signal.SIGINT)
    assert running.end() == 1
    assert journal_states() == {A: "done", B: "waiting", C: "waiting", D: "waiting"}
    code, result = rollout(pair.new, *QUICK, "--resume")
    assert code == 0 and set(states(result).values()) == {"done"}
    check(pair.all_new())


@pytest.mark.fault("controller's clock a day ahead, then a day behind", "exit 0; exit 5 and the way back as ever")
def test_the_controllers_clock_is_a_day_off(pair: Pair, tmp_path: Path) -> None:
    try:
        need_tools({"cc": "gcc libc6-dev"})
    except LabError as error:
        pytest.skip(f"no compiler can be installed here for clock.c: {error}")
    library, source = tmp_path / "clock.so", Path(__file__).with_name("clock.c")
    subprocess.run(["cc", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)

    def shifted(seconds: int) -> tuple[str, ...]:
        words = ("env", f"LD_PRELOAD={library}", f"CLOCK_SECONDS={seconds}")
        shown = subprocess.run([*words, "date", "+%s"], check=True, capture_output=True, text=True).stdout
        assert abs(int(shown) - time.time() - seconds) < 5
        return words

    code, result = rollout(pair.new, *QUICK, prefix=shifted(86_400))
    assert code == 0 and set(states(result).values()) == {"done"}
    check(pair.all_new())
    code, result = rollout("0.6.0", *QUICK, prefix=shifted(-86_400))
    stopped_at_the_canary(code, states(result), state="rolled back")
    check(pair.all_new())


@pytest.mark.fault(
    "two controllers at once", "exit 7 for the second, told who, what and since when; exit 0 for the first"
)
def test_two_at_once(pair: Pair) -> None:
    first = Started(pair.new, *QUICK)
    first.until("Look at the fleet")
    second = noxctl("rollout", str(bundle("0.6.0")), "--yes", *QUICK)
    assert second.returncode == 7 and second.stdout.count("\n") < 8
    assert (
        f"pid {first.process.pid}" in second.stderr
        and f"rollout of {pair.new}" in second.stderr
        and "since" in second.stderr
    )
    assert first.end() == 0
    check(pair.all_new())


@pytest.fixture
def other_inventory() -> Iterator[Path]:
    """A copy of the inventory without the fourth host, to be changed."""
    place = INVENTORY.with_name("fleet-changed")
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(INVENTORY, place, ignore=shutil.ignore_patterns(".state", ".bundles"))
    remove(place, D)
    yield place
    shutil.rmtree(place)


def remove(place: Path, host: str) -> dict[str, object]:
    path = place / "hosts.yml"
    inventory = yaml.safe_load(path.read_text())
    found: dict[str, object] = inventory["nox"]["hosts"].pop(host)
    path.write_text(yaml.safe_dump(inventory))
    return found


@pytest.mark.fault("inventory changed before --resume", "who left is left alone, who is new comes last; exit 0")
def test_the_inventory_changes_before_resume(pair: Pair, other_inventory: Path) -> None:
    words = ("--soak", "0", "-e", "nox_smoke_stable_seconds=1", "--limit", f"{A},{B},{C},{D}")
    running = Started(pair.new, *words, inventory=other_inventory)
    running.until("canary: upgrade")
    running.process.send_signal(signal.SIGINT)
    assert running.end() == 1
    about = yaml.safe_load((INVENTORY / "hosts.yml").read_text())["nox"]["hosts"][D]
    remove(other_inventory, B)
    path = other_inventory / "hosts.yml"
    inventory = yaml.safe_load(path.read_text())
    inventory["nox"]["hosts"][D] = about
    path.write_text(yaml.safe_dump(inventory))
    code, result = rollout(pair.new, "--resume", *words, inventory=other_inventory)
    assert code == 0 and states(result) == {A: "done", B: "gone", C: "done", D: "done"}
    assert [one["host"] for one in result["hosts"] if one["state"] != "gone"] == [A, C, D]
    check(pair.all_new() | {B: pair.old})


# ── No index


@pytest.mark.fault("no package index, from no host and not from here", "exit 0: all is in the bundle")
def test_no_package_index_is_needed(pair: Pair) -> None:
    # beyond its own network A reaches nothing; the control side's pip is told of an index that isn't there
    on(A, "ip route del default")
    for path in seen(A, "/opt/nox/archives").glob(f"*{pair.new}-*"):
        path.unlink()
    try:
        assert "unreachable" in on(A, "ip route get 192.0.2.1 2>&1")
        blind = (
            "env",
            "PIP_INDEX_URL=https://127.0.0.1:1/simple",
            "PIP_CONFIG_FILE=/dev/null",
            f"XDG_CACHE_HOME={STATE}/no-cache",
        )
        code, result = rollout(pair.new, *QUICK, prefix=blind)
    finally:
        on(A, "networkctl reconfigure host0 || systemctl restart systemd-networkd")
    assert code == 0 and set(states(result).values()) == {"done"}
    check(pair.all_new())


def test_two_builds_from_cold_caches_are_the_same_bytes(tmp_path: Path) -> None:
    first, second = bundle("0.8.0"), tmp_path / "again.bundle"
    cold = ("env", f"XDG_CACHE_HOME={tmp_path}/cold")
    words = ("bundle", "--app", str(BUNDLES / "0.8.0/app"), "--out", str(second), "--target", "3.11 x86_64")
    assert noxctl(*words, prefix=cold).returncode == 0
    assert first.read_bytes() == second.read_bytes()
