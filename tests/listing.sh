#!/usr/bin/env bash
# What is on a host, in a form to compare: files with owner, mode and content, accounts, units, packages, firewall rules.
# Times are left out, and what any apt run or start writes anew (caches, logs of the package system, backups of account files).
set -euo pipefail
export LC_ALL=C

find /etc /opt /usr/local /var/lib /var/log /home /root /run/systemd/system -xdev \
  \( -path /var/lib/apt -o -path /var/lib/dpkg -o -path /var/log/journal -o -path /var/log/apt -o -name .ansible \
  -o -path /var/lib/systemd -o -path /var/lib/ucf \) -prune -o \
  ! -name '*-' ! -path /etc/ld.so.cache ! -path '/var/log/dpkg.log' ! -path '/var/log/alternatives.log' \
  ! -path '/var/log/wtmp' ! -path '/var/log/btmp' ! -path '/var/log/lastlog' ! -path '/var/log/faillog' -printf '%p %y %u:%g %m %l\n' | sort
find /etc /opt /usr/local -xdev -type f ! -name '*-' ! -path /etc/ld.so.cache -exec sha256sum {} + | sort -k 2
getent passwd
getent group
systemctl list-unit-files --no-legend --no-pager | awk '{print "unit", $1, $2}' | sort
dpkg-query --show --showformat 'package ${Package} ${db:Status-Status}\n' | grep -v ' not-installed$' | sort
{ iptables-save 2>/dev/null || true; } | grep '^-A' || true
ss -Hlntu | awk '{print "listens", $1, $5}' | sort -u
