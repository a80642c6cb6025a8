"""The history of runs on a lab host: it reads like prose, holds no secret, keeps its bound, and survives what is done to the host.

    python -m tests.history

Repair, upgrade, rollback, and backup, uninstall, restore; after each, the runs of before are answered as they were, `git log` has
the commits of before, `git fsck --strict` finds nothing, and a new run is kept. Exit codes: 0 passed, 1 failed.
"""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.hostile.target import Target
from tests.on_hosts import BIN, ROOT, lab, on, run

LAB, HOST = "history", "nox1"
GIT = "git -C /var/lib/nox-api/history"


def play(inventory: Path, verb: str, **variables: Any) -> str:
    words = (BIN / "ansible-playbook", "-i", inventory, f"playbooks/{verb}.yml")
    return run(*words, "-e", json.dumps(variables))


def expect(good: bool, otherwise: str) -> None:
    if not good:
        sys.exit(otherwise)


class Witness:
    """What the host's history held when it was last looked at; from then on it must hold that, and what came since."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.runs: dict[str, dict[str, Any]] = {}
        self.commits: list[str] = []

    def record(self, run_id: str) -> dict[str, Any]:
        answer = self.target.request("GET", f"/history/{run_id}")
        expect(answer.status == 200, f"GET /history/{run_id}: {answer.status} {answer.body!r}")
        return answer.json()

    def add(self, result: dict[str, Any]) -> dict[str, Any]:
        run_id = str(result["run_id"])
        self.runs[run_id] = self.record(run_id)  # and with the question it is committed
        return self.runs[run_id]

    def look(self, after: str) -> None:
        for run_id, known in self.runs.items():
            expect(self.record(run_id) == known, f"after {after} the run {run_id} is another")
        self.add(self.target.python(f"print('after {after}')"))
        listed = [one["run_id"] for one in self.target.request("GET", "/history?limit=1000").json()["runs"]]
        expect(listed == sorted(listed, reverse=True), f"after {after} the list is out of order")
        expect(set(self.runs) <= set(listed), f"after {after} the list lacks runs")
        commits = on(LAB, HOST, f"{GIT} log --format=%H").split()
        expect(commits[-len(self.commits) :] == self.commits or not self.commits, f"after {after} commits are gone")
        expect(len(commits) > len(self.commits), f"after {after} nothing is committed")
        self.commits = commits
        on(LAB, HOST, f"{GIT} fsck --strict --full")
        print(f"── after {after}: {len(self.runs)} known runs as they were, {len(commits)} commits", flush=True)


def other_release(place: Path) -> str:
    for directory in ("app", "requirements"):
        shutil.copytree(ROOT / directory, place / directory, ignore=shutil.ignore_patterns("__pycache__", "tests"))
    project = place / "app/pyproject.toml"
    text = project.read_text()
    project.write_text(text.replace('version = "0.', 'version = "1.', 1))
    return str(place)


def target_of(inventory: Path) -> Target:
    known = subprocess.run(
        [BIN / "ansible-inventory", "-i", inventory, "--host", HOST], check=True, capture_output=True
    )
    # read without being shown
    read = [
        sys.executable,
        "-m",
        "lab",
        "ssh",
        f"--lab={LAB}",
        HOST,
        "sed -n s/^NOX_API_TOKEN=//p /etc/default/nox-api",
    ]
    token = subprocess.run(read, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    return Target(f"https://{json.loads(known.stdout)['ansible_host']}", token, str(inventory / f".ca/{HOST}.crt"))


def release() -> str:
    return Path(on(LAB, HOST, "readlink /opt/nox/current").strip()).name


def prove(inventory: Path, place: Path) -> None:
    history = {"nox_history": True}
    play(inventory, "install", **history)
    on(LAB, HOST, "command -v git || apt-get install -qq -y --no-install-recommends git")
    witness = Witness(target_of(inventory))
    target = witness.target

    secret = secrets.token_hex(16)
    code = "import os, sys\nprint(len(os.environ['KEY']), len(sys.stdin.read()))"
    kept = witness.add(target.python(code, env={"KEY": secret}, stdin=secret, args=["a"]))
    expect(kept["env"] == ["KEY"] and kept["source"] == code, f"kept is {kept}")
    witness.add(target.shell("echo of no use >&2; exit 3"))
    witness.add(target.python("while True: pass", timeout=1))
    witness.look("installation")
    log = on(LAB, HOST, f"{GIT} log --reverse --format='%h %ad%n%n%B'")
    for sentence in (
        "A Python program ended well after ",
        "It was given 1 argument, the variable KEY and 32 bytes of input.",
        "A shell script failed with exit status 3 after ",
        "It has 1 line and begins: echo of no use >&2; exit 3",
        "A Python program ran out of time after 1",
    ):
        expect(sentence in log, f"git log does not say: {sentence}")

    on(LAB, HOST, "rm /var/lib/nox-api/history/config /var/lib/nox-api/history/HEAD /usr/local/bin/nox-monitor")
    on(LAB, HOST, "systemctl disable --quiet --now nox-api")
    play(inventory, "repair", **history)
    witness.look("repair")

    play(inventory, "upgrade", nox_release_source=other_release(place / "other"), **history)
    expect(release().startswith("1."), "the upgrade did not take place")
    witness.look("upgrade")
    play(inventory, "rollback", **history)
    expect(release().startswith("0."), "the rollback did not take place")
    witness.look("rollback")

    play(inventory, "backup", nox_backup_dir=str(place / "backup"), **history)
    (archive,) = (place / "backup").glob("*.tar.gz")
    play(inventory, "uninstall", nox_uninstall_confirm=True)
    on(LAB, HOST, "! test -e /var/lib/nox-api")
    play(inventory, "restore", nox_restore_from=str(archive), **history)
    witness.target = target = target_of(inventory)  # the proxy has another authority now
    witness.look("restore")

    # Every object there is, not what the branch shows alone; then the files as they lie there, and the service's logs.
    on(LAB, HOST, f"! {GIT} cat-file --batch-all-objects --batch --buffer | grep --text --count {secret}")
    on(LAB, HOST, f"! grep --recursive --text --files-with-matches {secret} /var/lib/nox-api /var/log/nox-api")
    print("── the secret is in no object, file or log", flush=True)

    on(
        LAB,
        HOST,
        "sed -i s/^NOX_HISTORY_SIZE=.*/NOX_HISTORY_SIZE=2M/ /etc/default/nox-api && systemctl restart nox-api",
    )
    for number in range(60):
        target.python(f"pass # {secrets.token_hex(50_000)}")  # half of it can't be compressed away: 3 MB in all
        if number % 3 == 2:
            target.request("GET", "/history?limit=1")  # commits them: it's one commit that may go beyond the bound
    used = target.health()["history"]
    on_disk = int(on(LAB, HOST, "du -sk /var/lib/nox-api/history").split()[0]) << 10
    listed = target.request("GET", "/history?limit=1000").json()["runs"]
    expect(0 < len(listed) < 60, f"{len(listed)} runs are kept")
    expect(on_disk <= 2 << 20, f"{on_disk} bytes on disk")
    expect(used["dropped"] == 0, f"runs were not recorded: {used}")
    on(LAB, HOST, f"{GIT} fsck --strict --full")
    print(f"── 60 runs of 50 kB each under a bound of 2 MiB: {on_disk} bytes on disk, the last {len(listed)} runs kept")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="nox-history-") as place:
        inventory = Path(place, "inventory")
        with lab(LAB, inventory, HOST):
            prove(inventory, Path(place))
    print("history: told, kept, bounded, and no secret in it")


if __name__ == "__main__":
    main()
