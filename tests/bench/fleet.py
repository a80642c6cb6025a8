"""What noxctl costs: beside the least that ssh can do, and beside copying and unpacking the same release by hand.

    python -m tests.bench.fleet [-n 50] [--rounds 3] [--inventory DIR] [--json FILE]

Boots a lab of its own with N hosts, installs Nox there and takes it down at the end; with --inventory it measures hosts that
are installed already. The sides take turns, so that whatever else the machine does weighs on all alike. Writes its table to
docs/performance.md.

    status    noxctl status; beside a parallel `ssh host true`, both from no connection, and both over connections that are there
    upgrade   noxctl upgrade from a bundle, all hosts at once; beside a parallel scp and tar of the same release, pyinfra doing that, and
              a script that also compiles it, imports it, restarts the services and runs the smoke tests
    control   CPU seconds and memory of noxctl and all its processes, per host, for a status and for an upgrade, of ten hosts and of
              all. The others are timed on the first fifty.
    stopped   a rollout of a release that is too slow: how many hosts ever ran it, and how soon the canary was well again
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from noxctl.journal import Journal
from noxctl.rollout import read_bundle
from tests import releases
from tests.bench.__main__ import DOCUMENT, machine
from tests.bench.repair import CACHE, inventory_hosts, pyinfra_ready, run, ssh

ROOT = Path(__file__).resolve().parents[2]
LAB = "b-fleet"
BEGIN, END = "<!-- figures: tests/bench/fleet.py -->", "<!-- end of the fleet's figures -->"
NOXCTL = [sys.executable, "-m", "noxctl"]
TIMED = 50  # hosts that are timed, of as many as there are
FEW = 10  # hosts whose share of the control side is compared with that of all
DEPLOY = """
from pyinfra.operations import files, server

files.put(name="copy", src="{archive}", dest="/var/tmp/bench.tar.gz")
server.shell(name="unpack", commands=["mkdir -p /var/tmp/bench && tar -C /var/tmp/bench -xzf /var/tmp/bench.tar.gz"])
"""
Hosts = dict[str, dict[str, Any]]


def make_bundle(place: Path, version: str, addition: str = "") -> Path:
    """A release of this checkout under another number; with `addition` at the end of the application's module."""
    app, out = releases.tree(place, version, {"nox_api/application.py": addition}), place / f"{version}.bundle"
    run(*NOXCTL, "bundle", "--app", app, "--out", out, "--target", "3.11 x86_64")
    return out


def at_once(commands: list[list[str]]) -> None:
    """All of them in parallel; each must succeed."""
    with tempfile.TemporaryFile("w+") as said:  # by all of them: read only where one fails
        started = [subprocess.Popen(one, stdin=subprocess.DEVNULL, stdout=said, stderr=said) for one in commands]
        if failed := [one for one, process in zip(commands, started, strict=True) if process.wait() != 0]:
            said.seek(0)
            raise SystemExit(f"{said.read()}\nfailed, {len(failed)} of {len(commands)}: {shlex.join(failed[0])}")


def on_all(hosts: Hosts, command: str, shared: bool = True) -> None:
    at_once([[*ssh(one, shared), command] for one in hosts.values()])


def hang_up(hosts: Hosts) -> None:
    """Ends the connections that stay open, ours and Ansible's, which are the same."""
    for one in hosts.values():
        subprocess.run([*ssh(one, shared=True), "-O", "exit"], capture_output=True, check=False)


def by_hand(hosts: Hosts, archive: Path) -> None:
    """The release's archive to every host, and unpacked there."""
    commands = []
    for one in hosts.values():
        words = ssh(one, shared=True)
        copy = ["scp", "-q", *words[1:-1], str(archive), f"{words[-1]}:/var/tmp/bench.tar.gz"]
        unpack = [*words, "mkdir -p /var/tmp/bench && tar -C /var/tmp/bench -xzf /var/tmp/bench.tar.gz"]
        commands.append(["sh", "-c", f"{shlex.join(copy)} && {shlex.join(unpack)}"])
    at_once(commands)


# What an upgrade has to do on a host whatever does it, but for switching, which would make the host another one.
SCRIPT = """
set -e
python=$(echo /var/tmp/bench/venv/lib/python3*)
/var/tmp/bench/venv/bin/python3 -I -m compileall -q -x site-packages/pip/ "$python"
for name in nox_api nox_runner; do
  setpriv --reuid=65534 --regid=65534 --clear-groups /var/tmp/bench/venv/bin/python3 -I -m $name --version
done
systemctl restart nox-runner.socket nox-runner.service nox-api.service
about=$(python3 -c 'import json; a = json.load(open("/var/lib/nox/state.json"))["about"]; print(a["url"], a["ca"])')
for again in 1 2 3; do # fifty at once on two cores come to the ends of the tests' limits
  NOX_URL=${about% *} NOX_CA=${about#* } bash /usr/local/share/nox/tests/smoke.sh && exit 0
done
exit 1
"""


def by_script(hosts: Hosts, archive: Path) -> None:
    """The same, and then what else an upgrade must do, by one script per host that looks at nothing and remembers nothing."""
    by_hand(hosts, archive)
    on_all(hosts, SCRIPT)


def tree_memory(root: int) -> int:
    """Bytes of a process and all below it, shared pages dealt out (PSS)."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    mine, total = {root}, 0
    while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= more
    for pid in mine:
        try:
            found = re.search(r"(?m)^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())
            total += int(found[1]) << 10 if found else 0
        except OSError:
            continue
    return total


def cost(words: list[str], interval: float = 0.2) -> tuple[float, float]:
    """(CPU seconds, MiB at most, looked at so often) of a command and all that it starts; it must succeed."""
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
    most, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(interval):
            most[0] = max(most[0], tree_memory(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, status, used = os.wait4(process.pid, 0)
    over.set()
    watcher.join()
    if status != 0:
        raise SystemExit(f"failed: {shlex.join(words)}")
    return used.ru_utime + used.ru_stime, most[0] / (1 << 20)


def stopped(inventory: Path, bundle: Path, limit: str) -> tuple[int, float]:
    """(hosts that ever ran the bad release, seconds from the failed gate to a canary that passes its tests)."""
    words = [*NOXCTL, "rollout", str(bundle), "-i", str(inventory), "--yes", "--json", "--soak", "0", "--limit", limit]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 5:
        raise SystemExit(f"the bad release was not stopped:\n{done.stdout}{done.stderr}")
    journal = Journal()
    found = json.loads(done.stdout)["run"]
    rows = journal.hosts(found)
    (canary,) = [host for host, row in rows.items() if row["state"] != "waiting"]
    tested = [
        step["started"] + step["seconds"]
        for step in journal.steps(found)
        if step["host"] == canary
        and step["task"] == "Try the service as a client would"
        and step["outcome"] in ("ok", "changed")
    ]
    return len([row for row in rows.values() if row["state"] != "waiting"]), max(tested) - rows[canary]["ended"]


def measure(inventory: Path, rounds: int, place: Path) -> dict[str, Any]:
    every = {name: one for name, one in inventory_hosts(inventory).items() if not name.startswith("edge")}
    hosts = dict(list(every.items())[:TIMED])
    few, timed_hosts = ",".join(list(hosts)[:FEW]), ",".join(hosts)
    bundles = [make_bundle(place, version) for version in ("0.1.98", "0.1.99")]
    bad = make_bundle(place, "0.1.97", releases.SLOW)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, action: Callable[[], object]) -> None:
        begun = time.monotonic()
        action()
        seconds.setdefault(name, []).append(time.monotonic() - begun)
        print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)

    status = [*NOXCTL, "status", "-i", str(inventory), "--json", "--limit"]
    for _ in range(rounds):
        hang_up(hosts)
        timed("status, new connections", lambda: run(*status, timed_hosts))
        timed("ssh true, new connections", lambda: on_all(hosts, "true", shared=False))
        timed("status", lambda: run(*status, timed_hosts))
        timed("ssh true", lambda: on_all(hosts, "true"))
    pyinfra = pyinfra_ready(hosts)

    def upgrade(bundle: Path, limit: str) -> tuple[float, float]:
        words = [*NOXCTL, "upgrade", "-i", str(inventory), "--json", "-e", f"nox_release_bundle={bundle}"]
        # seldom, because a look takes a while where a thousand processes are
        return cost([*words, "--limit", limit], interval=2.0)

    for turn in range(rounds):
        bundle = bundles[turn % 2]
        (release,) = read_bundle(bundle)[0]["releases"]
        archive = Path("~/.cache/nox/releases").expanduser() / f"{release['id']}.tar.gz"
        on_all(hosts, f"rm -rf /var/tmp/bench* /opt/nox/archives/{release['id']}* /opt/nox/releases/{release['id']}")
        timed("scp and tar", lambda archive=archive: by_hand(hosts, archive))  # type: ignore[misc]
        timed("upgrade", lambda bundle=bundle: upgrade(bundle, timed_hosts))  # type: ignore[misc]
        on_all(hosts, "rm -rf /var/tmp/bench*")
        timed("script", lambda archive=archive: by_script(hosts, archive))  # type: ignore[misc]
        (CACHE / "bundle.py").write_text(DEPLOY.format(archive=archive))
        on_all(hosts, "rm -rf /var/tmp/bench*")
        timed("pyinfra", lambda: run(pyinfra[0], "-y", pyinfra[2], CACHE / "bundle.py"))
    on_all(hosts, "rm -rf /var/tmp/bench*")
    bundle = bundles[rounds % 2]
    control = {
        "status": {"few": cost([*status, few]), "all": cost([*status, "all"])},
        "upgrade": {"few": upgrade(bundle, few), "all": upgrade(bundle, "all")},
    }
    ran, back = stopped(inventory, bad, few)
    return {
        "hosts": len(hosts), "seconds": seconds,
        "median": {name: statistics.median(values) for name, values in seconds.items()},
        "few": few.count(",") + 1, "all": len(every), "control": control,
        "stopped": {"ran": ran, "seconds": back},
    }  # fmt: skip


def table(figures: dict[str, Any]) -> str:
    """As Markdown, each beside what the design asks for."""
    median, hosts = figures["median"], figures["hosts"]
    rows = ["| what | figure | beside | ratio | wanted |", "|---|---|---|---|---|"]

    def row(what: str, value: float, unit: str, beside: str, base: float, wanted: str) -> None:
        rows.append(f"| {what} | {value:.2f} {unit} | {beside} {base:.2f} | **{value / base:.2f} x** | {wanted} |")

    for how, wanted in ((", new connections", "≤ 2 x"), ("", "")):
        text = how or ", open connections"
        beside = "parallel `ssh host true`"
        row(
            f"`noxctl status`, {hosts} hosts{text}",
            median[f"status{how}"],
            "s",
            beside,
            median[f"ssh true{how}"],
            wanted,
        )
    for beside, wanted in (("scp and tar", "≤ 2 x"), ("pyinfra", "≤ 2 x"), ("script", "")):
        row(f"upgrade of {hosts} hosts at once", median["upgrade"], "s", beside, median[beside], wanted)
    few, every = figures["few"], figures["all"]
    for what, (unit, place) in itertools.product(("status", "upgrade"), (("s", 0), ("MiB", 1))):
        name = ("CPU", "memory")[place]
        one, all_of_them = (figures["control"][what][which][place] for which in ("few", "all"))
        row(
            f"{name} of the control side per host, `{what}` of {every}", all_of_them / every, unit, f"of {few}:", one / few, "≤ 1.2 x"
        )  # fmt: skip
    bad = figures["stopped"]
    rows.append(f"| hosts that ever ran a release that is too slow | {bad['ran']} | | | 1, the canary |")
    rows.append(f"| from its failed gate to the canary well again | {bad['seconds']:.1f} s | | | ≤ 15 s |")
    return "\n".join(rows)


def install(inventory: Path) -> None:
    """Nox on every host, which isn't what is measured: not on fifty at once, since smoke tests on a busy machine come to the
    ends of their limits, and once more where they did all the same."""
    words: list[str | Path] = [*NOXCTL, "install", "-i", inventory, "--forks", "16", "--json"]
    if subprocess.run(words, cwd=ROOT, capture_output=True, check=False).returncode != 0:
        run(*words)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=50, metavar="HOSTS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--inventory", type=Path, help="measure these hosts; their lab is left alone")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    os.environ["ANSIBLE_CONFIG"] = str(ROOT / "ansible.cfg")
    inventory = (options.inventory or ROOT / ".run/bench-fleet").resolve()
    with tempfile.TemporaryDirectory(prefix="bench-fleet-") as place:
        os.environ["NOX_STATE_DIR"] = f"{place}/state"
        try:
            if not options.inventory:
                run(sys.executable, "-m", "lab", "up", f"--lab={LAB}", "-n", str(options.n), f"--inventory={inventory}")
                install(inventory)
            figures = measure(inventory, options.rounds, Path(place))
        finally:
            if not options.inventory:
                run(sys.executable, "-m", "lab", "down", f"--lab={LAB}")
    text = f"`python -m tests.bench.fleet`, {options.rounds} rounds in turns, controller and hosts on {machine()}:\n\n{table(figures)}"
    print(text)
    before, _, after = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{text}\n{END}{after.partition(END)[2]}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
