"""The hostile suite against lab hosts that are made for it, with each backend, through the real proxy.

    python -m tests.hostile.lab [--kind nspawn|uml] [--suite SUITE] [--backend NAME]… [--memory 64M] [--cpus 0.5] [CASE…]

Boots a host, installs Nox on it by playbooks/install.yml, once for each backend, attacks, and prints one table. The
host goes in the end. Exit codes: 0 all passed, 1 some failed, 4 such hosts are not possible on this machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.hostile.__main__ import Verdict
from tests.hostile.target import Target

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ("zygote", "bubblewrap")
NOT_POSSIBLE = 4
_HOST = "nox1"
_INSTALL_SECONDS = 1200


class NotPossibleError(Exception):
    """Such hosts are not possible on this machine; the message says why."""


def main() -> int:
    options = arguments()
    lab = options.lab or f"hostile-{options.kind}"
    verdicts: dict[str, list[Verdict]] = {}
    with tempfile.TemporaryDirectory(prefix="nox-hostile-") as place:
        inventory = Path(place, "inventory")
        try:
            for backend in options.backend or BACKENDS:
                limits = {"nox_memory": options.memory, "nox_cpus": options.cpus}
                settings = {"nox_backend": backend, **{name: value for name, value in limits.items() if value}}
                with installed(lab, inventory, settings, options.kind, options.suite, stays=True) as nox:
                    url, token, ca = nox
                    served = Target(url, token.read_text(), str(ca)).health()["runner"]["backend"]
                    if served != backend:
                        raise RuntimeError(f"{backend} was installed, {served} serves")
                    verdicts[backend] = attack(lab, *nox, options.case)
        except NotPossibleError as reason:
            print(reason, file=sys.stderr)
            return NOT_POSSIBLE
        finally:
            the_lab("down", "--lab", lab)
    print(table(verdicts))
    return 1 if any(verdict.verdict == "FAILED" for found in verdicts.values() for verdict in found) else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.lab", description=__doc__.partition("\n")[0])
    parser.add_argument("--kind", choices=("nspawn", "uml"), default="nspawn")
    parser.add_argument("--lab", help="its name; default: hostile-KIND")
    parser.add_argument("--suite", default="auto", help="see `python -m lab up --help`")
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="only this one; may be repeated")
    parser.add_argument("--memory", help="nox_memory of the installation")
    parser.add_argument("--cpus", help="nox_cpus of the installation")
    parser.add_argument("case", nargs="*", help="only these numbers")
    return parser.parse_args()


def the_lab(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lab", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@contextmanager
def installed(
    lab: str,
    inventory: Path,
    settings: dict[str, str],
    kind: str = "nspawn",
    suite: str = "auto",
    *,
    stays: bool = False,
) -> Iterator[tuple[str, Path, Path]]:
    """A lab host with Nox installed: its URL, and the files of its token and CA. RuntimeError if the playbook fails."""
    up = ("up", "--lab", lab, "--hosts", _HOST, "--kind", kind, "--suite", suite, "--inventory", str(inventory))
    started = the_lab(*up)
    if started.returncode == NOT_POSSIBLE:
        raise NotPossibleError((started.stdout + started.stderr).strip())
    try:
        if started.returncode != 0:
            raise RuntimeError(f"the lab host did not come up:\n{started.stdout}{started.stderr}")
        install(inventory, settings)
        token = inventory / ".token"
        token.touch(mode=0o600)
        read = ("sed", "-n", "s/^NOX_API_TOKEN=//p", "/etc/default/nox-api")
        token.write_text(the_lab("ssh", "--lab", lab, _HOST, *read).stdout.strip())
        yield f"https://{address_of(inventory)}", token, inventory / f".ca/{_HOST}.crt"
    finally:
        if not stays:
            the_lab("down", "--lab", lab)


def install(inventory: Path, settings: dict[str, str]) -> None:
    """playbooks/install.yml on the host. RuntimeError with its last words if it fails."""
    playbook = str(Path(sys.executable).with_name("ansible-playbook"))
    command = [playbook, "-i", str(inventory), "playbooks/install.yml", "-e", json.dumps(settings)]
    print(f"$ {' '.join(command)}", file=sys.stderr, flush=True)
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=_INSTALL_SECONDS,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the playbook failed:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")


def attack(lab: str, url: str, token: Path, ca: Path, cases: list[str]) -> list[Verdict]:
    """The suite against the host; RuntimeError if it does not come to an end."""
    command = [
        *(sys.executable, "-m", "tests.hostile", "--json", "--url", url, "--token-file", str(token), "--ca", str(ca)),
        *("--host", f"{sys.executable} -m lab ssh --lab {lab} {_HOST}", *cases),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        return [Verdict(**each) for each in json.loads(done.stdout)]
    except ValueError:
        raise RuntimeError(f"the hostile suite broke off:\n{done.stdout[-2000:]}{done.stderr[-2000:]}") from None


def address_of(inventory: Path) -> str:
    command = [str(Path(sys.executable).with_name("ansible-inventory")), "-i", str(inventory), "--host", _HOST]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return str(json.loads(told)["ansible_host"])


def table(verdicts: dict[str, list[Verdict]]) -> str:
    """A row for each case: what was expected, what came of it with each backend."""
    first = next(iter(verdicts.values()))
    head = f"{'':2}  {'case':48}  {'expected':34}"
    lines = [head + "".join(f"  {name:58}" for name in verdicts)]
    for index, case in enumerate(first):
        row = f"{case.number:2}  {case.case[:48]:48}  {case.expected[:34]:34}"
        for found in verdicts.values():
            got = f"{found[index].verdict}: {' '.join(found[index].got.split())}"
            row += f"  {got[:58]:58}"
        lines.append(row.rstrip())
    for name, found in verdicts.items():
        passed = sum(verdict.verdict == "passed" for verdict in found)
        others = [f"{v.number} {v.verdict}: {v.got}" for v in found if v.verdict != "passed"]
        lines.append(f"{name}: {passed} of {len(found)} passed" + "".join(f"\n    {other}" for other in others))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
