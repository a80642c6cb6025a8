"""The HTTP server: uvicorn in this process, with systemd's readiness, reload and stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from nox_api import log
from nox_api.settings import load
from nox_api.state import State
from nox_runner import systemd
from nox_runner.settings import SettingsError

_DRAIN_MARGIN = 5.0
# Longer than a proxy keeps an idle connection (Caddy: 120 s), so that it is the proxy who closes:
# otherwise a request may meet a connection that is just being closed.
_KEEP_ALIVE_SECONDS = 150
_log = logging.getLogger("nox.server")


class Server(uvicorn.Server):
    """uvicorn's server, which tells systemd how far it is, and reloads at SIGHUP."""

    def __init__(self, config: uvicorn.Config, state: State, reload: Callable[[], None]) -> None:
        super().__init__(config)
        self._state = state
        self._reload = reload

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then be ready."""
        await super().startup(sockets)
        if self.started:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload)
            self._state.recorder.apply(self._state.settings)
            systemd.ready()
            where = {"address": self.config.host, "port": self.config.port}
            _log.info("ready", extra={"fields": where})

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, let requests end, then return."""
        systemd.stopping(self.config.timeout_graceful_shutdown or 0)
        _log.info("stopping")
        await super().shutdown(sockets)
        await self._state.recorder.close()
        _log.info("stopped")


def serve(app: FastAPI, settings_path: str) -> bool:
    """Serve until SIGTERM or SIGINT; SIGHUP reloads. False if it could not listen."""
    state: State = app.state.nox
    settings = state.settings
    config = uvicorn.Config(
        app,
        host=settings.bind_addr,
        port=settings.port,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        # Whom to believe is decided in access.py, and only for the log.
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=round(settings.timeout + _DRAIN_MARGIN),
    )
    server = Server(config, state, lambda: reload(state, config, settings_path))
    # After its orderly end uvicorn raises the signal again, for handlers that were there before.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run()
    return server.started


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
