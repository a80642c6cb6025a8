"""``python3 -m lab``: see ``python3 -m lab --help``. Exit codes: 0 ok, 1 failed, 2 usage, 4 this machine can't host."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lab import fleet, machine, ssh
from lab.state import KINDS, MAX_HOSTS, CannotHost, LabError, lab_names, valid_name

INVENTORY = Path(__file__).resolve().parent.parent / "inventory" / "lab"
SUITES = ("auto", *machine.DEBIAN_SUITES, *machine.UBUNTU_SUITES)


def _name(text: str) -> str:
    if not valid_name(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no name: lower-case letters, digits and inner hyphens, at most 32"
        )
    return text


def _names(text: str) -> list[str]:
    names = [_name(word) for word in text.split(",")]
    if len(set(names)) != len(names):
        raise argparse.ArgumentTypeError("a host is named twice")
    return names


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= MAX_HOSTS:
        raise argparse.ArgumentTypeError(f"{text!r}: from 1 to {MAX_HOSTS}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python3 -m lab",
        description="Real systemd hosts on this machine, for tests and demos.",
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str, lab: str | None = "lab") -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.add_argument(
            "--lab",
            metavar="NAME",
            type=_name,
            default=lab,
            help="the lab's name" + (f" (default: {lab})" if lab else ""),
        )
        return added

    up = verb("up", "Bring up hosts; those that run stay untouched.")
    which = up.add_mutually_exclusive_group()
    which.add_argument(
        "-n",
        metavar="N",
        type=_count,
        default=1,
        help=f"hosts nox1 to noxN (1 to {MAX_HOSTS}; default: 1)",
    )
    which.add_argument("--hosts", metavar="A,B,C", type=_names, help="hosts of these names instead")
    up.add_argument(
        "--suite",
        choices=SUITES,
        default="auto",
        help="auto: jammy where apt reaches Ubuntu's archive, else bookworm",
    )
    up.add_argument(
        "--kind",
        choices=KINDS,
        default="nspawn",
        help="nspawn: fast; uml: a kernel of its own, cgroup limits enforced",
    )
    up.add_argument(
        "--inventory",
        metavar="DIR",
        type=Path,
        help="where to write hosts.yml and known_hosts (default: inventory/lab)",
    )
    up.add_argument("--json", action="store_true", help="print the lab as JSON")

    down = verb("down", "End hosts (default: all of the lab) and remove what they leave.")
    down.add_argument("--all", action="store_true", help="every lab, unless --lab names one")
    down.add_argument("host", nargs="*", type=_name)

    status = verb("status", "Show the hosts of one lab or of all.", lab=None)
    status.add_argument("--json", action="store_true")

    ssh = verb("ssh", "Log in to a host as root, or run a command there.")
    ssh.add_argument("host", metavar="HOST", type=_name)
    ssh.add_argument("command", nargs=argparse.REMAINDER)

    for name, text in (
        ("console", "Print a host's console log."),
        ("reboot", "Reboot a host and wait until it is back."),
    ):
        verb(name, text).add_argument("host", metavar="HOST", type=_name)

    verbs.add_parser(
        "check", help="Say whether this machine can host (exit code 0 or 4); changes nothing."
    )
    verbs.add_parser("purge", help="Remove the cached bases too.")
    return top


def _table(rows: list[fleet.Status]) -> str:
    lines = [("LAB", "HOST", "KIND", "SUITE", "ADDRESS", "STATE", "PID", "MEMORY", "UPTIME")]
    for row in rows:
        seconds = int(row.uptime)
        lines.append(
            (
                row.lab,
                row.host,
                row.kind,
                row.suite,
                row.address,
                row.state,
                str(row.pid or "-"),
                f"{row.memory / 2**20:.0f} MiB",
                f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    )


def _up(arguments: argparse.Namespace) -> None:
    wanted = arguments.hosts or [f"nox{number}" for number in range(1, arguments.n + 1)]
    directory = arguments.inventory.resolve() if arguments.inventory else None
    lab = fleet.up(arguments.lab, wanted, arguments.suite, arguments.kind, directory, INVENTORY)
    rows = fleet.status([lab.name])
    if arguments.json:
        record = {
            "lab": lab.name,
            "bridge": lab.bridge,
            "subnet": lab.subnet,
            "gateway": lab.gateway,
        }
        record |= {"inventory": lab.inventory or "", "key": str(lab.key)}
        print(json.dumps({**record, "hosts": [asdict(row) for row in rows]}, indent=1))
    else:
        print(_table(rows))
        print(f"inventory: {lab.inventory}")


def _down(arguments: argparse.Namespace) -> None:
    every = arguments.all and "--lab" not in " ".join(sys.argv)
    if every and arguments.host:
        raise LabError("--all ends every host; name hosts or say --all, not both")
    names = lab_names() if every else [arguments.lab]
    ended = sum(fleet.down(name, arguments.host) for name in names)
    machine.say(f"{ended} host{'' if ended == 1 else 's'} ended" if ended else "nothing to end")


def main(words: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    try:
        machine.check_machine()
        match arguments.verb:
            case "check":
                print("this machine can host")
            case "up":
                _up(arguments)
            case "down":
                _down(arguments)
            case "purge":
                fleet.purge()
            case "status":
                rows = fleet.status([arguments.lab] if arguments.lab else lab_names())
                print(
                    json.dumps([asdict(row) for row in rows], indent=1)
                    if arguments.json
                    else _table(rows)
                )
            case "ssh":
                lab, host = fleet.find_host(arguments.lab, arguments.host)
                command = ssh.command(lab, host) + arguments.command
                sys.stdout.flush()
                os.execvp(command[0], command)
            case "console":
                _, host = fleet.find_host(arguments.lab, arguments.host)
                if host.console.exists():
                    with host.console.open(errors="replace") as log:
                        shutil.copyfileobj(log, sys.stdout)
            case "reboot":
                lab, host = fleet.find_host(arguments.lab, arguments.host)
                machine.say(f"{host.name} is back after {fleet.reboot(lab, host):.1f} s")
    except LabError as exc:
        print(f"lab: {exc}", file=sys.stderr)
        return 4 if isinstance(exc, CannotHost) else 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever read the output has seen enough
    except KeyboardInterrupt:
        print("lab: interrupted; what runs: python3 -m lab status", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
