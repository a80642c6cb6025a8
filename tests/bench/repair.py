"""Repair and install beside what others would take for the same; measured in turns, medians count.

    python -m tests.bench.repair [--part clean] [--part install] [--part damages] [-n HOSTS] [--inventory DIR]

Parts, each with lab hosts of its own (clean also with those of --inventory, on which Nox is installed):

    clean     ansible-playbook playbooks/repair.yml, all hosts clean, beside a parallel `ssh host python3 -c pass` and pyinfra
              with the files, accounts, packages and units of the first host's record (installed into .cache/bench)
    install   playbooks/install.yml on a fresh host, beside install.sh there; the release is built, as for all but the first host
    damages   every so-manieth damage of molecule/repair done to one host, and mended: --every

Writes bench-repair.json and, from it, the second table of docs/performance.md; parts that were not measured stay.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tests.bench.__main__ import machine

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
CACHE = ROOT / ".cache/bench"
JSON = ROOT / "bench-repair.json"
DOCUMENT = ROOT / "docs/performance.md"
BEGIN, END = "<!-- figures: repair and install -->", "<!-- end of repair and install -->"
PARTS = ("clean", "install", "damages")

# Reads the record's copy beside it. With --dry pyinfra only looks, as a repair of clean hosts does.
DEPLOY = """
import json, pathlib
from pyinfra.operations import apt, files, server, systemd
record = json.loads(pathlib.Path(__file__).with_name("state.json").read_text())
for path, entry in record["paths"].items():
    user, group = entry["owner"].split(":")
    mode = entry.get("mode")
    if entry["kind"] == "link":
        files.link(path=path, target=entry["content"])
    elif entry["kind"] == "directory":
        files.directory(path=path, user=user, group=group, mode=mode)
    else:
        files.file(path=path, user=user, group=group, mode=mode)
for name, entry in record["accounts"].items():
    server.user(user=name, uid=entry["uid"], home=entry["home"], shell=entry["shell"], ensure_home=False)
apt.packages(packages=list(record["packages"]))
for unit in record["units"]:
    systemd.service(service=unit, running=True, enabled=True)
"""


def run(*words: str | Path) -> str:
    done = subprocess.run([str(word) for word in words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(
            f"{shlex.join(map(str, words))}: status {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}"
        )
    return done.stdout


def inventory_hosts(inventory: Path) -> dict[str, dict[str, Any]]:
    listed = json.loads(run(BIN / "ansible-inventory", "-i", inventory, "--list"))
    return dict(listed["_meta"]["hostvars"])


def ssh(variables: dict[str, Any], shared: bool) -> list[str]:
    """The words that reach a host, over a connection that stays if `shared`."""
    control = shlex.split(variables["ansible_ssh_extra_args"]) if shared else ["-o", "ControlPath=none"]
    return [
        "ssh",
        *shlex.split(variables["ansible_ssh_common_args"]),
        *("-o", "ControlMaster=auto", "-o", "ControlPersist=300"),
        *control,
        *("-i", variables["ansible_ssh_private_key_file"]),
        f"{variables['ansible_user']}@{variables['ansible_host']}",
    ]


def floor(hosts: dict[str, dict[str, Any]], shared: bool) -> None:
    """One interpreter on each host, all at once."""
    words = [[*ssh(one, shared), "python3 -c pass"] for one in hosts.values()]
    started = [subprocess.Popen(one, stdin=subprocess.DEVNULL) for one in words]
    statuses = [process.wait() for process in started]
    if any(statuses):
        raise SystemExit("ssh failed")


def repair(inventory: Path) -> int:
    """The most tasks that it took on any host."""
    out = run(BIN / "ansible-playbook", "-i", inventory, ROOT / "playbooks/repair.yml")
    if "mended" in out:
        raise SystemExit(f"the hosts were not clean:\n{out[-2000:]}")
    return max(map(int, re.findall(r" ok=(\d+) ", out)))


def pyinfra_ready(hosts: dict[str, dict[str, Any]]) -> list[str | Path]:
    """The command that lets pyinfra look at all hosts; its environment and files are made first."""
    CACHE.mkdir(parents=True, exist_ok=True)
    program = CACHE / "venv/bin/pyinfra"
    if not program.exists():
        run(BIN / "uv", "venv", "--quiet", "--clear", "--python", sys.executable, CACHE / "venv")
        uv = (BIN / "uv", "pip", "install", "--quiet", "--system-certs", "--python", CACHE / "venv/bin/python")
        run(*uv, "pyinfra>=3,<4")
    first = next(iter(hosts.values()))
    (CACHE / "state.json").write_text(run(*ssh(first, shared=True), "cat /var/lib/nox/state.json"))
    (CACHE / "state.json").chmod(0o600)
    (CACHE / "deploy.py").write_text(DEPLOY)
    known = shlex.split(first["ansible_ssh_common_args"])[1].removeprefix("UserKnownHostsFile=")
    data = {"ssh_user": first["ansible_user"], "ssh_key": first["ansible_ssh_private_key_file"]}
    data |= {"ssh_known_hosts_file": known, "ssh_strict_host_key_checking": "yes"}
    (CACHE / "inventory.py").write_text(
        f"hosts = [(name, {data!r}) for name in {[h['ansible_host'] for h in hosts.values()]!r}]\n"
    )
    return [program, "--dry", CACHE / "inventory.py", CACHE / "deploy.py"]


@contextmanager
def lab(name: str, count: int, installed: bool) -> Iterator[Path]:
    """The inventory of as many hosts, which end with the block."""
    inventory = ROOT / ".run" / name
    try:
        run(sys.executable, "-m", "lab", "up", f"--lab={name}", "-n", str(count), f"--inventory={inventory}")
        if installed:
            run(BIN / "ansible-playbook", "-i", inventory, ROOT / "playbooks/install.yml")
        yield inventory
    finally:
        run(sys.executable, "-m", "lab", "down", f"--lab={name}")


def in_turns(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            begun = time.monotonic()
            side()
            if turn:  # the first one opens connections and fills caches
                seconds[name].append(time.monotonic() - begun)
    return seconds


def clean(options: argparse.Namespace) -> dict[str, Any]:
    there = nullcontext(options.inventory.resolve()) if options.inventory else lab("b-clean", options.n, installed=True)
    with there as inventory:
        hosts = inventory_hosts(inventory)
        command = pyinfra_ready(hosts)
        tasks = [0]
        sides: dict[str, Callable[[], object]] = {
            "repair": lambda: tasks.append(repair(inventory)),
            "ssh": lambda: floor(hosts, shared=False),
            "ssh, open connections": lambda: floor(hosts, shared=True),
            "pyinfra": lambda: run(*command),
        }
        seconds = in_turns(sides, options.rounds)
    return {"hosts": len(hosts), "tasks": max(tasks), "seconds": seconds}


def payload(host: dict[str, Any], place: Path) -> None:
    """What install.sh wants: the files that the roles wrote on an installed host, without its secrets, and the service's tree."""
    files = "etc/default/nox-api etc/logrotate.d/nox-api etc/systemd/system/nox-* etc/caddy usr/local/bin/nox-* usr/local/share/nox"
    history = "var/lib/nox-api/history/HEAD var/lib/nox-api/history/config"
    packed = subprocess.run(
        [*ssh(host, shared=True), f"cd / && tar -c {files} {history}"], capture_output=True, check=True
    )
    subprocess.run(["tar", "-C", place, "-x"], input=packed.stdout, check=True)
    for name in ("app/nox_api", "app/nox_runner", "requirements"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    settings = place / "etc/default/nox-api"
    settings.write_text(re.sub(r"(?m)^NOX_API_TOKEN=.*", "NOX_API_TOKEN=", settings.read_text()))
    shutil.copy(ROOT / "tests/bench/install.sh", place)


def by_hand(host: dict[str, Any], place: Path, address: str) -> None:
    """Ships the files and runs the script. The site's names are those of the host they came from: its address is changed."""
    site = place / "etc/caddy/sites-enabled/nox-api.caddy"
    before = site.read_text()
    site.write_text(before.replace(address, host["ansible_host"]))
    packed = subprocess.run(["tar", "-C", place, "-cz", "."], capture_output=True, check=True)
    site.write_text(before)
    script = f"mkdir /root/by-hand && cd /root/by-hand && tar -xz && bash install.sh {host['ansible_host']}"
    done = subprocess.run([*ssh(host, shared=True), script], input=packed.stdout, capture_output=True, check=False)
    if done.returncode != 0:
        raise SystemExit((done.stdout + done.stderr).decode()[-3000:])


def install(options: argparse.Namespace) -> dict[str, Any]:
    """Fresh hosts in turn: one by the playbook, one by the script."""
    seconds: dict[str, list[float]] = {"playbook": [], "script": []}
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch, lab("b-model", 1, installed=True) as inventory:
        model = inventory_hosts(inventory)["nox1"]
        payload(model, Path(scratch))
        for turn in range(options.installs):
            with lab("b-install", 2, installed=False) as inventory:
                one, other = inventory_hosts(inventory).values()
                floor({"one": one, "other": other}, shared=True)
                playbook = [BIN / "ansible-playbook", "-i", inventory, "--limit=nox1", ROOT / "playbooks/install.yml"]
                sides: list[tuple[str, Callable[[], object]]] = [
                    ("playbook", lambda playbook=playbook: run(*playbook)),  # type: ignore[misc]
                    ("script", lambda other=other: by_hand(other, Path(scratch), model["ansible_host"])),  # type: ignore[misc]
                ]
                for name, side in sides[:: 1 - 2 * (turn % 2)]:  # now this one first, now that one
                    begun = time.monotonic()
                    side()
                    seconds[name].append(time.monotonic() - begun)
    return {"seconds": seconds}


def damages(options: argparse.Namespace) -> dict[str, Any]:
    every = runpy.run_path(str(ROOT / "molecule/repair/tests/damages.py"))["DAMAGES"]
    seconds: dict[str, float] = {}
    with lab("b-damages", 1, installed=True) as inventory, tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        host = inventory_hosts(inventory)["nox1"]
        report = Path(scratch) / "report.json"
        command: list[str | Path] = ["-i", inventory, ROOT / "playbooks/repair.yml", "-e", f"nox_repair_json={report}"]
        release = run(*ssh(host, shared=True), "basename $(readlink /opt/nox/current)").strip()
        fill = {"{release}": release, "{record}": "/var/lib/nox/state.json", "{{": "{"}
        for one in every[:: options.every]:
            words = re.sub(r"\{\{|\{release\}|\{record\}", lambda found: fill[found[0]], one.command)
            subprocess.run([*ssh(host, shared=True), words], capture_output=True, check=False)
            begun = time.monotonic()
            run(BIN / "ansible-playbook", *command)
            seconds[one.name] = time.monotonic() - begun
            if json.loads(report.read_text())["nox1"]["state"] != "mended":
                raise SystemExit(f"{one.name}: {report.read_text()}")
            back = "test ! -e /root/sandbox-before || { cp -a /root/sandbox-before/. /home/nox/nox/sandbox; rm -r /root/sandbox-before; }"
            run(*ssh(host, shared=True), back)
    return {"of": len(every), "seconds": seconds}


def table(figures: dict[str, Any]) -> str:
    rows = ["| what | figure | beside | ratio | wanted |", "|---|---|---|---|---|"]
    said = []
    for name, part in figures.items():
        said.append(f"`{part['command']}` on {part['machine']}.")
        seconds = part["seconds"]
        if name.startswith("clean"):
            medians = {side: statistics.median(values) for side, values in seconds.items()}
            for side, wanted in (("pyinfra", "≤ 0.75 x"), ("ssh", "≤ 3 x"), ("ssh, open connections", "")):
                ratio = medians["repair"] / medians[side]
                what = f"clean repair, {part['hosts']} hosts"
                rows.append(
                    f"| {what} | {medians['repair']:.2f} s | {side} {medians[side]:.2f} | **{ratio:.2f} x** | {wanted} |"
                )
            rows.append(f"| tasks on a clean host | {part['tasks']} | | | ≤ 3 |")
        elif name == "install":
            ours, theirs = (statistics.median(seconds[side]) for side in ("playbook", "script"))
            what = f"install on a fresh host, {len(seconds['script'])} each"
            rows.append(f"| {what} | {ours:.1f} s | bash script {theirs:.1f} | **{ours / theirs:.2f} x** | ≤ 1.0 x |")
        else:
            values = sorted(seconds.values())
            what = f"damage to healthy, {len(values)} of {part['of']} damages, median"
            worst = max(seconds, key=lambda one: seconds[one])
            rows.append(
                f"| {what} | **{statistics.median(values):.1f} s** | most: {values[-1]:.1f} s, {worst} | | ≤ 10 s |"
            )
    return "\n".join(said) + "\n\n" + "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("-n", type=int, default=10, metavar="HOSTS", help="of the part clean (%(default)s)")
    parser.add_argument("--inventory", type=Path, metavar="DIR", help="of the part clean: measure these hosts")
    parser.add_argument("--rounds", type=int, default=5, help="of the part clean (%(default)s)")
    parser.add_argument("--installs", type=int, default=3, help="of the part install, of each kind (%(default)s)")
    parser.add_argument("--every", type=int, default=1, help="of the part damages (%(default)s)")
    options = parser.parse_args()
    os.environ["ANSIBLE_CONFIG"] = str(ROOT / "ansible.cfg")
    figures = json.loads(JSON.read_text()) if JSON.exists() else {}
    measure = {"clean": clean, "install": install, "damages": damages}
    for name in options.part or PARTS:
        found = measure[name](options)
        found["machine"] = machine()
        words = ["python", "-m", "tests.bench.repair", *sys.argv[1:]]
        found["command"] = shlex.join(words).replace(str(options.inventory), "DIR")
        figures[f"clean {found['hosts']}" if name == "clean" else name] = found
        JSON.write_text(json.dumps(figures, indent=1) + "\n")
    text = table(figures)
    print(text)
    before, _, after = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{text}\n{END}{after.partition(END)[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
