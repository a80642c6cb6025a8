"""`python -m nox_api`: start the front."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys

from nox_api import __version__, log, settings
from nox_api.application import create_app
from nox_api.history.recorder import DEFAULT_PATH
from nox_api.runner import DEFAULT_SOCKET, RunnerClient
from nox_api.server import serve
from nox_runner.settings import SettingsError

_log = logging.getLogger("nox.start")


def main() -> int:
    """Serve until stopped. Exit code 0 after a stop, 78 for bad settings, else 1."""
    # A reload that comes before there is anything to reload would end the process.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    arguments = _arguments()
    log.configure(None, "info")
    try:
        log.configure(arguments.log_dir, "info")
        current = settings.load(arguments.settings)
    except (SettingsError, OSError) as error:
        _log.error("start_failed", extra={"fields": {"reason": str(error)}})
        return os.EX_CONFIG if isinstance(error, SettingsError) else 1
    log.set_level(current.log_level)
    app = create_app(current, RunnerClient(arguments.runner_socket), arguments.history_dir)
    return 0 if serve(app, arguments.settings) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nox_api", description=__doc__)
    parser.add_argument("--settings", default=settings.DEFAULT_PATH, metavar="FILE")
    parser.add_argument("--runner-socket", default=DEFAULT_SOCKET, metavar="PATH")
    parser.add_argument(
        "--log-dir", metavar="DIR", help="for nox-api.log and error.log; without it: stderr"
    )
    parser.add_argument(
        "--history-dir", default=DEFAULT_PATH, metavar="DIR", help="the Git repository of past runs"
    )
    parser.add_argument("--version", action="version", version=__version__)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
