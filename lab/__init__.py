"""Real systemd hosts on one Linux machine, for the demo, Molecule and the fleet tests.

``python3 -m lab up -n 3`` boots three hosts, each with its own address, sshd and package manager,
and writes an Ansible inventory of them. There are two kinds:

* ``nspawn``: a systemd-nspawn container on an overlay over a shared root. Half a second to ssh,
  10 MiB. ``MemoryMax=`` and ``TasksMax=`` hold only where the machine hands cgroup v2 controllers
  down; elsewhere systemd ignores them without a word.
* ``uml``: a User-mode Linux kernel. Ten seconds to ssh, 300 MiB, and every cgroup limit holds.

Standard library only. It needs root on Debian or Ubuntu; PID 1 may be systemd, or anything else.
"""
