"""The guides, followed to the letter: the commands on the pages of docs/, word for word, on fresh lab hosts.

    python -m tests.guides [PAGE…]      # without names: all

Above a block of shell stands a comment that says where it runs: `run: control` (in a copy of the checkout), `run: host`
(as root on a host), `run: client` (with NOX_URL, NOX_TOKEN, NOX_CA of the last installed host); or `not run:` and the reason. `shows`
above the block that follows compares the output: JSON by its members (of what is measured only the kind), text line by
line; "…" stands for anything. A command that fails ends the test. Exit codes: 0 passed, 1 failed, 2 usage, 4 can't run here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.on_hosts import BIN, ROOT, lab, run

LAB = "guides"
SERVER, REMOTE = "server", "run1"  # the one installs itself, the other is installed over ssh
# In the order a reader goes: later pages use the hosts that `install` has made.
PAGES = "quickstart install api tokens proxies limits history repair troubleshooting troubleshooting.fr fleet operations".split()
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>run: (?:control|host|client)|not run: [^>]+|shows|says: [^>]+|do) -->\n)?"
    r"^```(?P<kind>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
END = "end-of-block"


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    place: str  # control, host, client; "" if it isn't run
    text: str
    shows: str
    shown_as: str


def blocks(page: str) -> Iterator[Block]:
    """The blocks of a page that are to run; an unmarked one ends the test."""
    source = (ROOT / f"docs/{page}.md").read_text(encoding="utf-8")
    found = list(BLOCK.finditer(source))
    for block, following in zip(found, [*found[1:], None], strict=True):
        line = source[: block.start("text")].count("\n") + 1
        mark = block["mark"] or ""
        if mark in ("shows", "do") or mark.startswith("says: "):
            continue  # says, do: a symptom and what helps, which tests/troubleshooting.py tries
        if not mark:
            sys.exit(f"docs/{page}.md:{line}: a block without a mark: run: …, or not run: and the reason")
        shows = following if following and following["mark"] == "shows" else None
        place = mark.removeprefix("run: ") if mark.startswith("run: ") else ""
        if not place:
            print(f"docs/{page}.md:{line}: {mark}", flush=True)
            continue
        yield Block(page, line, place, block["text"], shows["text"] if shows else "", shows["kind"] if shows else "")


class Shell:
    """A shell that stays, so that a block finds what the ones before it have set."""

    def __init__(self, *command: str, cwd: Path, environment: dict[str, str]) -> None:
        # not ours: ssh makes it non-blocking, which Ansible refuses
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by close()
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            text=True,
            bufsize=1,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
        )

    def run(self, text: str) -> tuple[bool, str]:
        """Whether each command of a block succeeded, and what the block wrote to its standard output."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"set -eo pipefail\n{{\n{text}\n}} < /dev/null\nprintf '\\n{END}\\n'\n")
        self.process.stdin.flush()
        lines: list[str] = []
        for line in self.process.stdout:
            if line == f"{END}\n":
                return True, "".join(lines).removesuffix("\n")
            lines.append(line)
        return False, "".join(lines)

    def close(self) -> None:
        if self.process.stdin:
            self.process.stdin.close()
        self.process.wait()
        self.errors.seek(0)
        print(self.errors.read(), end="", flush=True)
        self.errors.close()


def fits(shown: str, got: str) -> bool:
    """Whether it is as a page shows it, where "…" stands for anything."""
    return re.fullmatch(".*".join(re.escape(part) for part in shown.split("…")), got, re.DOTALL) is not None


def alike(wanted: Any, got: Any, place: str = "") -> str:
    """Where an answer differs from what the page shows; "" if it doesn't."""
    if isinstance(wanted, dict) and isinstance(got, dict):
        if wanted.keys() != got.keys():
            return f"{place or 'the answer'} has {' '.join(sorted(got))}, the page {' '.join(sorted(wanted))}"
        return next(filter(None, (alike(wanted[key], got[key], f"{place}.{key}") for key in wanted)), "")
    if isinstance(wanted, list) and isinstance(got, list):
        if len(wanted) != len(got):
            return f"{place} has {len(got)} entries, the page {len(wanted)}"
        return next(filter(None, (alike(*pair, f"{place}[]") for pair in zip(wanted, got, strict=True))), "")
    if place.rpartition(".")[2] in ("run_id", "duration_ms", "cpu_ms", "max_rss_bytes", "version"):
        return "" if type(wanted) is type(got) else f"{place} is {got!r}"
    if isinstance(wanted, str) and isinstance(got, str) and fits(wanted, got):
        return ""
    return "" if wanted == got else f"{place} is {got!r}, the page says {wanted!r}"


def compare(block: Block, output: str) -> str:
    """What is wrong with a block's output; "" if it is as the page shows."""
    if block.shown_as == "json":
        try:
            return alike(json.loads(block.shows), json.loads(output))
        except ValueError as error:
            return f"not JSON: {error}"
    for wanted, got in zip(block.shows.splitlines(), output.splitlines(), strict=False):
        if not fits(wanted, got):
            return f"{got!r}, the page shows {wanted!r}"
    missing = len(block.shows.splitlines()) - len(output.splitlines())
    return f"{missing} lines fewer than shown" if missing > 0 else ""


EDITOR = """#!{python}
# Puts the lab's host where a reader would put theirs.
import sys, yaml
inventory = yaml.safe_load(open({known!r}))
inventory["nox"]["hosts"] = {{{host!r}: inventory["nox"]["hosts"][{host!r}]}}
yaml.safe_dump(inventory, open(sys.argv[1], "w"))
"""


class Reader:
    """Somebody who follows the pages, with a checkout as `git clone` would give it, here and on the server."""

    def __init__(self, place: Path) -> None:
        self.checkout = place / "nox"
        self.checkout.mkdir()
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        self.archive = place / "nox.tar"
        subprocess.run(
            ["tar", "--create", "--null", "--files-from=-", "--file", self.archive],
            cwd=ROOT,
            input=listed.stdout,
            check=True,
        )
        subprocess.run(["tar", "--extract", "--file", self.archive], cwd=self.checkout, check=True)
        self.inventory = place / "inventory"
        self.editor = place / "editor"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ANSIBLE_", "NOX_", "MAKE"))}
        # a reader's python3, not the one of our own environment
        path = os.pathsep.join(one for one in kept["PATH"].split(os.pathsep) if Path(one) != BIN)
        mine = {"EDITOR": str(self.editor), "NOX_STATE_DIR": str(place / "state")}  # not the journal of who runs this
        self.environment = {**kept, "PATH": path, "ANSIBLE_NOCOLOR": "1", **mine}

    def get_hosts(self) -> None:
        known = str(self.inventory / "hosts.yml")
        self.editor.write_text(EDITOR.format(python=sys.executable, known=known, host=REMOTE))
        self.editor.chmod(0o755)
        ssh = (sys.executable, "-m", "lab", "ssh", f"--lab={LAB}", SERVER)
        with self.archive.open("rb") as archive:
            subprocess.run([*ssh, "mkdir nox && tar -x -C nox"], cwd=ROOT, stdin=archive, check=True)

    def client(self) -> dict[str, str]:
        """What a client of the host that was installed over ssh needs."""
        certificate = self.checkout / f"inventory/mine/.ca/{REMOTE}.crt"
        if not certificate.exists():
            return {}
        hosts = json.loads(
            subprocess.run(
                [BIN / "ansible-inventory", "-i", self.inventory, "--list"], check=True, capture_output=True
            ).stdout
        )["_meta"]["hostvars"]
        token = subprocess.run(
            [sys.executable, "-m", "lab", "ssh", f"--lab={LAB}", REMOTE]
            + ["sed -n s/^NOX_API_TOKEN=//p /etc/default/nox-api"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        return {
            "NOX_URL": f"https://{hosts[REMOTE]['ansible_host']}",
            "NOX_CA": str(certificate),
            "NOX_TOKEN": token,
        }

    def open_shell(self, place: str) -> Shell:
        if place == "host":
            command = (sys.executable, "-m", "lab", "ssh", f"--lab={LAB}", SERVER, "bash")
            return Shell(*command, cwd=ROOT, environment=dict(os.environ))
        environment = self.environment | (self.client() if place == "client" else {})
        return Shell("bash", cwd=self.checkout, environment=environment)

    def follow(self, page: str) -> int:
        """Run a page's blocks in their order → how many there were."""
        shells: dict[str, Shell] = {}
        count = 0
        try:
            for block in blocks(page):
                place = f"docs/{page}.md:{block.line}"
                print(f"\n── {place}, {block.place}\n{block.text}", end="", flush=True)
                if block.place not in shells:
                    shells[block.place] = self.open_shell(block.place)
                good, output = shells[block.place].run(block.text)
                print(re.sub(r"(TOKEN=)\S+", r"\1…", output), flush=True)
                if not good:
                    sys.exit(f"{place}: a command failed")
                if block.shows and (wrong := compare(block, output)):
                    sys.exit(f"{place}: {wrong}")
                count += 1
        finally:
            for shell in shells.values():
                shell.close()
        return count


def main(chosen: list[str]) -> None:
    if unknown := set(chosen) - set(PAGES):
        print(f"unknown: {' '.join(unknown)}; there are: {' '.join(PAGES)}", file=sys.stderr)
        sys.exit(2)
    pages = [page for page in PAGES if not chosen or page in chosen]
    with tempfile.TemporaryDirectory(prefix="nox-guides-") as place:
        reader = Reader(Path(place))
        counts = {}
        if "quickstart" in pages:
            # the page's demo brings up, and ends, the lab that `make demo` always uses
            status = [sys.executable, "-m", "lab", "status", "--json"]
            labs = json.loads(subprocess.run(status, cwd=ROOT, check=True, capture_output=True).stdout)
            if any(one["lab"] == "lab" for one in labs):
                print("a demo or a lab is up on this machine: make demo-down, or make lab-down", file=sys.stderr)
                sys.exit(4)
            try:
                counts["quickstart"] = reader.follow("quickstart")
            finally:
                run(sys.executable, "-m", "lab", "down", "--lab=lab")
        if later := [page for page in pages if page != "quickstart"]:
            with lab(LAB, reader.inventory, SERVER, REMOTE):
                reader.get_hosts()
                for page in dict.fromkeys(["install", *later]):
                    counts[page] = reader.follow(page)
    print("\nfollowed: " + ", ".join(f"{page} ({count} blocks)" for page, count in counts.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
