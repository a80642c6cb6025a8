"""`python -m nox_runner`: start the runner."""

from __future__ import annotations

import argparse
import os
import pwd
import resource
import socket
import sys

from nox_runner import __version__, listing, orphans, settings, systemd
from nox_runner.choice import choose
from nox_runner.command import Command
from nox_runner.log import log, set_level
from nox_runner.operations import Service
from nox_runner.server import Server, listen
from nox_runner.settings import Settings, SettingsError


class _StartError(Exception):
    """The runner cannot start; the message says what to do."""


def main() -> int:
    """Run until stopped. Exit code 0 after a stop, 78 for bad settings, else 1."""
    arguments = _arguments()
    try:
        if os.getuid() == 0:
            raise _StartError(
                "the runner must not be root; start it by: "
                "setpriv --reuid nox --regid nox --clear-groups python -m nox_runner …"
            )
        current = _read(arguments.settings)
        set_level(current.log_level)
        client = _uid(arguments.client_user)
        listener = _listener(arguments.socket)
        orphans.adopt()
    except (_StartError, SettingsError, OSError, ValueError) as error:
        log("error", "start_failed", reason=str(error))
        return os.EX_CONFIG if isinstance(error, SettingsError) else 1
    _raise_open_files()
    os.umask(0o022)
    service: Service | None = None
    try:
        backend, proof = choose(
            Command(arguments.bwrap), lambda: service.settings if service else current
        )
    except OSError as error:
        log("error", "start_failed", reason=str(error))
        return 1
    service = Service(current, backend, proof)
    if removed := listing.remove_leftovers(current.sandbox):
        log("info", "leftovers_removed", uploads=removed)
    service.quota.start()
    proof.able()  # at once, unless the choice has asked already

    def reload() -> None:
        assert service is not None
        try:
            service.settings = _read(arguments.settings)
        except SettingsError as error:
            log("error", "reload_failed", reason=str(error), effect="old settings stay in force")
        else:
            set_level(service.settings.log_level)
            log("info", "reloaded")

    try:
        Server(listener, service, client, reload).run()
    finally:
        if arguments.socket:
            os.unlink(arguments.socket)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nox_runner", description=__doc__)
    parser.add_argument("--settings", default="/run/nox-runner/settings", metavar="FILE")
    parser.add_argument(
        "--socket", metavar="PATH", help="listen here; without it systemd passes the socket"
    )
    parser.add_argument(
        "--client-user",
        default="nox-api",
        metavar="USER",
        help="the only user that may connect, a name or a number; 'self' is the runner's own"
        " (default: nox-api)",
    )
    parser.add_argument("--bwrap", default="/usr/bin/bwrap", metavar="PATH")
    parser.add_argument("--version", action="version", version=__version__)
    return parser.parse_args()


def _read(path: str) -> Settings:
    assignments = settings.read(path)
    built = settings.build(Settings, assignments, path)
    for message in settings.warnings(assignments, path):
        log("warning", "settings", reason=message)
    if any(assignment.key == settings.TOKEN_KEY for assignment in assignments):
        log("warning", "settings", reason=f"{path}: holds the token, which is the front's alone")
    return built


def _uid(user: str) -> int:
    if user == "self":
        return os.getuid()
    if user.isdigit():
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise _StartError(f"--client-user: there is no user {user!r}") from None


def _listener(path: str | None) -> socket.socket:
    if path:
        return listen(path)
    passed = systemd.passed_socket()
    if passed is None:
        raise _StartError("no socket: start it by systemd, or give --socket PATH")
    return passed


def _raise_open_files() -> None:
    """A run takes about twenty descriptors; the usual soft limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    sys.exit(main())
