"""The command line. Exit codes: 0 ok, 1 failed, 2 usage, 4 this machine can't host."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lab import fleet, inherited, ssh
from lab.machine import check_machine, say
from lab.state import KINDS, MAX_HOSTS, CannotHost, LabError, lab_names, valid_name

INVENTORY = Path(__file__).resolve().parent.parent / "inventory" / "lab"
SUITES = ("auto", *inherited.DEBIAN_SUITES, *inherited.UBUNTU_SUITES)


def _name(text: str) -> str:
    if not valid_name(text):
        rule = "lower-case letters, digits and inner hyphens, at most 24"
        raise argparse.ArgumentTypeError(f"{text!r} is no name: {rule}")
    return text


def _names(text: str) -> list[str]:
    names = [_name(word) for word in text.split(",")]
    if not len(set(names)) == len(names) <= MAX_HOSTS:
        raise argparse.ArgumentTypeError(f"{text!r}: up to {MAX_HOSTS} names, each once")
    return names


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_HOSTS:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 1 and {MAX_HOSTS}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="python3 -m lab",
        description="Real systemd hosts on this machine, for tests and demos.",
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text)

    def lab_verb(name: str, text: str, default: str | None = "lab") -> argparse.ArgumentParser:
        added = verb(name, text)
        which = f"the lab (default: {default or 'all'})"
        added.add_argument("--lab", metavar="NAME", type=_name, default=default, help=which)
        return added

    up = lab_verb("up", "Bring up hosts; those that run stay untouched.")
    hosts = up.add_mutually_exclusive_group()
    count = f"the hosts nox1 to noxN (1 to {MAX_HOSTS}; default: 1)"
    hosts.add_argument("-n", metavar="N", type=_count, default=1, help=count)
    hosts.add_argument("--hosts", metavar="A,B,C", type=_names, help="hosts of these names instead")
    auto = "default: auto, which is jammy where apt reaches it, else bookworm"
    up.add_argument("--suite", choices=SUITES, default="auto", help=auto)
    kind = "nspawn: up in a second (the default); uml: cgroup limits are enforced, on any machine"
    up.add_argument("--kind", choices=KINDS, default="nspawn", help=kind)
    where = "for hosts.yml and .known_hosts (default: inventory/lab)"
    up.add_argument("--inventory", metavar="DIR", type=Path, help=where)
    up.add_argument("--json", action="store_true", help="print the lab as JSON")

    down = lab_verb("down", "End hosts, or the whole lab, and remove what they leave.", None)
    down.add_argument("--all", action="store_true", help="all hosts of --lab, or of every lab")
    down.add_argument("host", nargs="*", type=_name, help="default: all hosts of the lab `lab`")

    status = lab_verb("status", "Show the hosts.", None)
    status.add_argument("--json", action="store_true", help="print them as JSON")

    into = lab_verb("ssh", "Log in to a host as root, or run a command there.")
    into.add_argument("host", metavar="HOST", type=_name)
    into.add_argument("command", nargs=argparse.REMAINDER)

    console = lab_verb("console", "Print the console log of a host.")
    console.add_argument("host", metavar="HOST", type=_name)

    reboot = lab_verb("reboot", "Reboot a host and wait until ssh answers again.")
    reboot.add_argument("host", metavar="HOST", type=_name)

    verb("check", "Say whether this machine can host (exit code 0 or 4); changes nothing.")
    verb("purge", "Remove the caches that no host stands on.")
    return top


def _table(rows: Sequence[fleet.Status]) -> str:
    lines = [["LAB", "HOST", "KIND", "SUITE", "ADDRESS", "STATE", "PID", "MEMORY", "UPTIME"]]
    for row in rows:
        minutes, seconds = divmod(int(row.uptime), 60)
        uptime = f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
        memory = f"{row.memory / 2**20:.0f} MiB"
        texts = [row.lab, row.host, row.kind, row.suite, row.address, row.state]
        lines.append([*texts, str(row.pid or "-"), memory, uptime])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def _up(arguments: argparse.Namespace) -> None:
    wanted = fleet.Wanted(
        hosts=arguments.hosts or [f"nox{number}" for number in range(1, arguments.n + 1)],
        suite=arguments.suite,
        kind=arguments.kind,
        inventory=arguments.inventory and arguments.inventory.resolve(),
        default_inventory=INVENTORY,
    )
    lab = fleet.up(arguments.lab, wanted)
    rows = fleet.status([lab.name])
    if arguments.json:
        record = {
            "lab": lab.name,
            "bridge": lab.bridge,
            "subnet": lab.subnet,
            "gateway": lab.gateway,
            "inventory": lab.inventory,
            "key": str(lab.key),
            "hosts": [asdict(row) for row in rows],
        }
        print(json.dumps(record, indent=1))
    else:
        print(f"{_table(rows)}\ninventory: {lab.inventory}")


def _down(arguments: argparse.Namespace) -> None:
    if arguments.all and arguments.host:
        raise LabError("--all ends all hosts: name none")
    names = lab_names() if arguments.all and not arguments.lab else [arguments.lab or "lab"]
    ended = sum(fleet.down(name, arguments.host) for name in names)
    say(f"{ended} host{'' if ended == 1 else 's'} ended" if ended else "there was nothing to end")


def _status(arguments: argparse.Namespace) -> None:
    rows = fleet.status([arguments.lab] if arguments.lab else lab_names())
    print(json.dumps([asdict(row) for row in rows], indent=1) if arguments.json else _table(rows))


def _ssh(arguments: argparse.Namespace) -> None:
    command = ssh.command(*fleet.find_host(arguments.lab, arguments.host)) + arguments.command
    os.execvp(command[0], command)  # noqa: S606 (our own words, no shell wanted)


def _console(arguments: argparse.Namespace) -> None:
    _, host = fleet.find_host(arguments.lab, arguments.host)
    with host.console.open(errors="replace") as log:
        shutil.copyfileobj(log, sys.stdout)


def _reboot(arguments: argparse.Namespace) -> None:
    seconds = fleet.reboot(*fleet.find_host(arguments.lab, arguments.host))
    say(f"{arguments.host} is back after {seconds:.1f} s")


def _check(arguments: argparse.Namespace) -> None:
    print("this machine can host")


def _purge(arguments: argparse.Namespace) -> None:
    fleet.purge()


_VERBS = {
    "up": _up,
    "down": _down,
    "status": _status,
    "ssh": _ssh,
    "console": _console,
    "reboot": _reboot,
    "check": _check,
    "purge": _purge,
}


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = parser().parse_args(words)
    os.umask(0o022)  # a base is for all its users, whatever root's habit is
    try:
        check_machine()
        _VERBS[arguments.verb](arguments)
    except LabError as exc:
        print(f"lab: {exc}", file=sys.stderr)
        return 4 if isinstance(exc, CannotHost) else 1
    except KeyboardInterrupt:
        print("lab: interrupted; what runs: python3 -m lab status", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
