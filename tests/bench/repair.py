"""What a clean repair costs: beside the least that ssh can do, and beside pyinfra asking for the same things.

    repair.py [-n 10] [--rounds 5] [--inventory DIR] [--json FILE]

Boots a lab of its own with N hosts, installs Nox there and takes it down at the end; with --inventory it measures hosts
that are installed already. Three programs in turns, so that whatever else the machine does weighs on all alike; the
ratios are what counts:

    repair    ansible-playbook playbooks/repair.yml, all hosts clean
    floor     a parallel `ssh host python3 -c pass`; `open`: over connections that are there already, as repair's are
    pyinfra   the files, accounts, packages and units of the first host's record; installed into .cache/bench
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
CACHE = ROOT / ".cache/bench"
LAB = "b-repair"

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


def repair(inventory: Path) -> None:
    out = run(BIN / "ansible-playbook", "-i", inventory, ROOT / "playbooks/repair.yml")
    if "mended" in out or "left" in out.splitlines()[-1]:
        raise SystemExit(f"the hosts were not clean:\n{out[-2000:]}")


def pyinfra_ready(hosts: dict[str, dict[str, Any]]) -> list[str | Path]:
    """The command that lets pyinfra look at all hosts; its environment and files are made first."""
    CACHE.mkdir(parents=True, exist_ok=True)
    program = CACHE / "venv/bin/pyinfra"
    if not program.exists():
        run(BIN / "uv", "venv", "--quiet", "--clear", "--python", sys.executable, CACHE / "venv")
        run(BIN / "uv", "pip", "install", "--quiet", "--python", CACHE / "venv/bin/python", "pyinfra>=3,<4")
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=10, metavar="HOSTS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--inventory", type=Path, help="measure these hosts; their lab is left alone")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    os.environ["ANSIBLE_CONFIG"] = str(ROOT / "ansible.cfg")
    inventory = options.inventory or ROOT / ".run/bench-repair"
    try:
        if not options.inventory:
            run(sys.executable, "-m", "lab", "up", f"--lab={LAB}", "-n", str(options.n), f"--inventory={inventory}")
            run(BIN / "ansible-playbook", "-i", inventory, ROOT / "playbooks/install.yml")
        hosts = inventory_hosts(inventory)
        command = pyinfra_ready(hosts)
        sides: dict[str, Callable[[], object]] = {
            "repair": lambda: repair(inventory),
            "floor": lambda: floor(hosts, shared=False),
            "open": lambda: floor(hosts, shared=True),
            "pyinfra": lambda: run(*command),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(options.rounds + 1):
            for name, side in sides.items():
                begun = time.monotonic()
                side()
                if turn:  # the first one opens connections and fills caches
                    seconds[name].append(time.monotonic() - begun)
    finally:
        if not options.inventory:
            run(sys.executable, "-m", "lab", "down", f"--lab={LAB}")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"clean repair, {len(hosts)} hosts, {options.rounds} rounds in turns\n\n{'':8}  median s  repair is")
    for name, median in medians.items():
        print(f"{name:8}  {median:8.2f}  {medians['repair'] / median:8.2f} times")
    if options.json:
        options.json.write_text(
            json.dumps({"hosts": len(hosts), "seconds": seconds, "median": medians}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
