"""nox_archive by a real Ansible, on this machine: what is sent, and what isn't."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from noxctl.play import ROOT, environment

PLAYBOOK = """
- name: Ship
  hosts: localhost
  connection: local
  gather_facts: false
  vars:
    ansible_python_interpreter: PYTHON
    archives: PLACE/nox/archives
  module_defaults:
    nox.platform.nox_archive: {src: PLACE/archive, id: 1.0-abc, sha256: DIGEST, root: PLACE/nox}
  tasks:
    - name: Say what would be sent
      nox.platform.nox_archive:
      check_mode: true
      register: would
    - name: Send all of it
      nox.platform.nox_archive:
      register: first
    - name: Send nothing
      nox.platform.nox_archive:
      register: second
    - name: Damage it
      ansible.builtin.copy: {content: damaged, dest: "{{ archives }}/1.0-abc.tar.gz", mode: "0644"}
    - name: Keep a piece and a bit, as after a connection that ended
      ansible.builtin.shell: head -c 10000000 PLACE/archive > {{ archives }}/.1.0-abc.tar.gz.part
    - name: Send the rest
      nox.platform.nox_archive:
      register: rest
    - name: Keep what is not the beginning of it
      ansible.builtin.shell: rm {{ archives }}/1.0-abc.tar.gz; head -c 12000000 /dev/zero > {{ archives }}/.1.0-abc.tar.gz.part
    - name: Send the rest, find out, send all
      nox.platform.nox_archive:
      register: anew
    - name: Send something else
      nox.platform.nox_archive: {id: 1.0-def, sha256: "0000"}
      register: wrong
      failed_when: not wrong.failed
    - name: Judge
      ansible.builtin.assert:
        that:
          - would.changed and first.changed and first.pieces == 3 and first.complete
          - not second.changed and second.complete and second.pieces is not defined
          - rest.complete and rest.pieces == 2
          - anew.complete and anew.pieces == 4
          - "'SHA-256' in wrong.msg"
"""


def test_each_byte_is_sent_once(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to root")
    data = os.urandom(20_000_000)
    (tmp_path / "archive").write_bytes(data)
    text = PLAYBOOK.replace("PLACE", str(tmp_path)).replace("PYTHON", sys.executable)
    (tmp_path / "ship.yml").write_text(text.replace("DIGEST", hashlib.sha256(data).hexdigest()))
    done = subprocess.run(
        ["ansible-playbook", "-i", "localhost,", tmp_path / "ship.yml"],
        cwd=ROOT, env={**os.environ, **environment()}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    places = tmp_path / "nox/archives"
    assert (places / "1.0-abc.tar.gz").read_bytes() == data
    assert [path.name for path in places.iterdir() if path.suffix != ".part"] == ["1.0-abc.tar.gz"]
