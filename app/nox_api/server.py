"""The HTTP server: uvicorn in this process, with systemd's readiness, reload and stop.

The listening socket, and connections on which nothing is under way, are kept by systemd over a
restart (its descriptor store), so that nobody is refused and no request is lost meanwhile.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable
from typing import Any, cast

import uvicorn
from fastapi import FastAPI

from nox_api import log
from nox_api.connection import STORED, Connection, Handover
from nox_api.settings import load
from nox_api.state import State
from nox_runner import systemd
from nox_runner.settings import SettingsError

_DRAIN_MARGIN = 5.0
# Longer than a proxy keeps an idle connection (Caddy: 120 s), so that it is the proxy who closes:
# otherwise a request may meet a connection that is just being closed.
_KEEP_ALIVE_SECONDS = 150
_BACKLOG = 2048
_LISTENER = "listener"
"""The listening socket's name in systemd's descriptor store."""
_log = logging.getLogger("nox.server")


class Server(uvicorn.Server):
    """uvicorn's server, which tells systemd how far it is, reloads at SIGHUP, and hands on."""

    def __init__(
        self,
        config: uvicorn.Config,
        state: State,
        reload: Callable[[], None],
        adopted: list[socket.socket],
    ) -> None:
        super().__init__(config)
        self._state = state
        self._reload = reload
        self._adopted = adopted
        self._handover = Handover()
        # uvicorn calls it as it would call a class of its own.
        config.http = cast(Any, functools.partial(Connection, handover=self._handover))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, take over the last process's connections, then be ready."""
        await super().startup(sockets)
        if self.started:
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGHUP, self._reload)
            self._state.recorder.apply(self._state.settings)
            for connection in self._adopted:
                connection.setblocking(False)
                await loop.connect_accepted_socket(self._protocol, connection)
            systemd.ready()
            where = {"address": self.config.host, "port": self.config.port}
            _log.info("ready", extra={"fields": {**where, "taken_over": len(self._adopted)}})

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, hand on idle connections, let requests end, then return."""
        systemd.stopping(self.config.timeout_graceful_shutdown or 0)
        _log.info("stopping")
        self._handover.begun = True
        await super().shutdown(sockets)
        systemd.settle()
        await self._state.recorder.close()
        _log.info("stopped")

    def _protocol(self) -> asyncio.Protocol:
        make: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = make(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol


def serve(app: FastAPI, settings_path: str) -> bool:
    """Serve until SIGTERM or SIGINT; SIGHUP reloads. False if it could not listen."""
    state: State = app.state.nox
    settings = state.settings
    try:
        listener, adopted = _inherit(settings.bind_addr, settings.port)
    except OSError as error:
        fields = {"address": settings.bind_addr, "port": settings.port, "reason": str(error)}
        _log.error("listen_failed", extra={"fields": fields})
        return False
    config = uvicorn.Config(
        app,
        host=settings.bind_addr,
        port=settings.port,
        backlog=_BACKLOG,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        # Whom to believe is decided in access.py, and only for the log.
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=round(settings.timeout + _DRAIN_MARGIN),
    )
    server = Server(config, state, lambda: reload(state, config, settings_path), adopted)
    # After its orderly end uvicorn raises the signal again, for handlers that were there before.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run([listener])
    return server.started


def _inherit(address: str, port: int) -> tuple[socket.socket, list[socket.socket]]:
    """The listening socket, and the last process's idle connections.

    The socket is the last process's too if it is where the settings want it. OSError if it is not
    there and can not be made.
    """
    listeners: list[socket.socket] = []
    connections: list[socket.socket] = []
    for name, passed in systemd.passed_sockets():
        (connections if name == STORED else listeners).append(passed)
    # Or they would stay open when this process closes them.
    systemd.forget(STORED)
    wanted = (ipaddress.ip_address(address), port)
    kept = [one for one in listeners if _place(one) == wanted]
    if kept:
        return kept[0], connections
    systemd.forget(_LISTENER)
    for old in listeners:
        old.close()
    if listeners:
        systemd.settle()  # the old place may be part of the new one
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.create_server((address, port), family=family, backlog=_BACKLOG)
    systemd.store(_LISTENER, [made.fileno()])
    return made, connections


def _place(listener: socket.socket) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]:
    address, port = listener.getsockname()[:2]
    return ipaddress.ip_address(address.partition("%")[0]), port


def reload(state: State, config: uvicorn.Config, path: str) -> None:
    """Read the settings again; a bad file changes nothing."""
    systemd.reloading()
    try:
        settings = load(path)
    except SettingsError as error:
        fields = {"reason": str(error), "effect": "old settings stay in force"}
        _log.error("reload_failed", extra={"fields": fields})
    else:
        if (settings.bind_addr, settings.port) != (config.host, config.port):
            fields = {"reason": "a new address or port needs a restart"}
            _log.warning("reload_incomplete", extra={"fields": fields})
        state.reload(settings)
        config.timeout_graceful_shutdown = round(settings.timeout + _DRAIN_MARGIN)
        log.set_level(settings.log_level)
        _log.info("reloaded")
    systemd.ready()
