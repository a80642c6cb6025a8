# SPDX-License-Identifier: Apache-2.0
"""Commands of the host, run with the same environment whoever asks: a module, nox-debug, a sudo with a PATH of its own."""

from __future__ import annotations

import os
import subprocess

ENVIRONMENT = {
    **os.environ,
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
}


def run(*words: str, seconds: float | None = 30.0, text: str = "") -> subprocess.CompletedProcess[str]:
    """One command; `seconds` None: however long it takes. Status 127, as in a shell, for a program that isn't there or is too slow."""
    try:
        return subprocess.run(
            words, input=text, capture_output=True, text=True, errors="replace", timeout=seconds, env=ENVIRONMENT
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(words, 127, "", str(error))
