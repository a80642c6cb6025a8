"""Real systemd hosts on one Linux machine, for the demo, Molecule and the fleet tests.

``python3 -m lab up -n 3`` boots three hosts with their own address, sshd and package manager, and writes an
Ansible inventory for them. Two kinds:

* ``nspawn``: a systemd-nspawn container on an overlay over one shared root. On ssh in about two seconds, 12 MiB each.
  Where the machine itself has no cgroup v2 controllers, ``MemoryMax=`` and ``TasksMax=`` are ignored inside.
* ``uml``: a User-mode Linux kernel of its own. Slower to boot, but every cgroup limit is enforced.

Standard library only; needs root on Debian or Ubuntu. systemd as PID 1 of the machine is welcome, not required.
"""
