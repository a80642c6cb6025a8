"""What tests that bring up a lab of their own share: commands that are shown as they run, and the lab itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def run(*words: str | Path, cwd: Path = ROOT, environment: Mapping[str, str] = os.environ) -> str:
    """Run a command, show what it says, return it; ends the test if it fails."""
    command = [str(word) for word in words]
    print(f"$ {' '.join(command)}", flush=True)
    with subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode != 0:
        sys.exit(f"status {process.returncode}: {' '.join(command)}")
    return "".join(lines)


@contextmanager
def lab(name: str, inventory: Path, *hosts: str) -> Iterator[None]:
    """Fresh hosts, an inventory of them, and nothing of them afterwards."""
    verbs = (sys.executable, "-m", "lab")
    try:
        run(*verbs, "up", f"--lab={name}", f"--hosts={','.join(hosts)}", f"--inventory={inventory}")
        yield
    finally:
        run(*verbs, "down", f"--lab={name}")


def on(name: str, host: str, command: str) -> str:
    """Run a shell command as root on a host of a lab; ends the test if it fails."""
    return run(sys.executable, "-m", "lab", "ssh", f"--lab={name}", host, command)
