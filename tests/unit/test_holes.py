"""Where Ansible's own gates let a rollout go on: real runs of it, and what noxctl makes of them. The other half, that no
wave begins after such a host, is molecule/fleet/trouble."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from noxctl.play import End, Options, play

ROOT = Path(__file__).resolve().parents[2]

INVENTORY = """
nox:
  hosts:
    first: {ansible_connection: local}
    lost: {ansible_host: 127.0.0.1, ansible_port: 1, ansible_ssh_common_args: -o ConnectTimeout=2}
    rescued: {ansible_connection: local}
    failed: {ansible_connection: local}
    last: {ansible_connection: local}
  vars:
    ansible_python_interpreter: PYTHON
"""

TASKS = """
  hosts: nox
  gather_facts: false
  tasks:
    - name: Change it
      block:
        - name: Try
          ansible.builtin.command: "{{ (inventory_hostname == 'rescued') | ternary('false', 'true') }}"
          changed_when: false
      rescue:
        - name: Go back
          ansible.builtin.command: "true"
          changed_when: false

    - name: Judge
      ansible.builtin.fail:
        msg: it doesn't work
      when: inventory_hostname == "failed"
"""


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    path = tmp_path / "hosts.yml"
    path.write_text(INVENTORY.replace("PYTHON", sys.executable))
    return path


def run(tmp_path: Path, inventory: Path, head: str) -> dict[str, End]:
    playbook = tmp_path / "playbook.yml"
    playbook.write_text(f"- name: Roll out\n{head}{TASKS}")
    return play(str(playbook), Options(inventory))


def test_serial_goes_on_after_lost_and_rescued_hosts(tmp_path: Path, inventory: Path) -> None:
    """ansible#56265: no host may fail, the second batch has one that is lost and one that was rescued, and the third is run."""
    ends = run(tmp_path, inventory, "  serial: [1, 2, 100%]\n  max_fail_percentage: 0\n")
    assert ends["last"].ok > 0
    # so a wave of noxctl's is a run of its own, and these are counted by it
    assert (ends["first"].word, ends["lost"].word, ends["rescued"].word) == ("ok", "unreachable", "rescued")


def test_one_run_says_of_every_host_how_it_came_out(tmp_path: Path, inventory: Path) -> None:
    """A host that failed or was rescued doesn't hide the others, and none of them is rescued with it (ansible#83854)."""
    ends = run(tmp_path, inventory, "")
    assert {host: end.word for host, end in ends.items()} == {
        "lost": "unreachable", "rescued": "rescued", "failed": "failed", "first": "ok", "last": "ok",
    }  # fmt: skip
    assert ends["rescued"].rescued == 1 and ends["rescued"].failed == 0  # Ansible's own exit code calls that a success
    assert ends["failed"].error == "it doesn't work" and ends["rescued"].task == "Try"


def test_what_is_known_outlives_a_play_that_died(tmp_path: Path) -> None:
    """kubespray#13030: what set_fact kept is gone with the play. The journal is on disk before each step."""
    code = (
        "import os; from noxctl.journal import Journal; from pathlib import Path\n"
        "journal = Journal(); run = journal.begin('rollout', Path('hosts.yml'))\n"
        "journal.plan(run, [('canary', ['a']), ('wave 1', ['b'])]); journal.host(run, 'a', state='done')\n"
        "journal.host(run, 'b', state='running'); print(run, flush=True); os.kill(os.getpid(), 9)\n"
    )
    environment = {"NOX_STATE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    died = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert died.returncode == -9
    told = subprocess.run(
        [sys.executable, "-m", "noxctl", "runs", "--json"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )  # fmt: skip
    assert [(run["id"], run["outcome"]) for run in json.loads(told.stdout)] == [(died.stdout.strip(), "running")]
